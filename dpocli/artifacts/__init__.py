"""What the commands leave on disk: the reference cache, run directories, reports. Torch-free."""
