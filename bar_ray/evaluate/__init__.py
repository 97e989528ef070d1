"""Scores of a checkpoint on held-out tests, by category."""
