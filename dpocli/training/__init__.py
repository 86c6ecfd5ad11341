"""Policy, optimizer, step, loop and monitoring of a training run."""
