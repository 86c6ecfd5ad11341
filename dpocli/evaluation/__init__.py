"""Figures of an evaluation, with intervals and slices."""
