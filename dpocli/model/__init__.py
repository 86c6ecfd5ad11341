"""Find, load, identify, adapt, merge and save a model."""
