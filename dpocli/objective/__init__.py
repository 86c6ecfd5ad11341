"""From a model and a batch of pairs to per-token log-probs, and from log-probs to losses and metrics."""
