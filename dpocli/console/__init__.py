"""Output that a person reads."""
