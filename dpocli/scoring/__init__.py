"""Log-probs of a model: layouts, attention, head, passes, checks."""
