"""The three commands: each `run(options, terminal)` tells its story in a page."""
