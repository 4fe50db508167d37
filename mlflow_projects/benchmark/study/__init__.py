"""Accuracy at equal budget: a declared study becomes trainings, rows of what was measured, statistics and a page."""
