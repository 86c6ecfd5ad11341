"""Direct Preference Optimization with a reference cache that can be trusted: precompute, train, evaluate."""

__version__ = "0.1.0"
