"""Every option and every loss, as data. Nothing here imports torch."""
