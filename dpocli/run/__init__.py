"""One output directory: lock, status, configuration, metrics."""
