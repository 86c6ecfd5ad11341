"""Terminal table, HTML page and plots of an evaluation."""
