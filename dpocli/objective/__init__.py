"""Losses and metrics of pairs, from their log-probs."""
