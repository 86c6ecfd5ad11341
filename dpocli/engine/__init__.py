"""Models, processes, and the training loop."""
