"""Processes, launchers, sharding, signals, shared file systems."""
