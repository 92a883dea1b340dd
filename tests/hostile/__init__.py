"""Hostile, broken and honest submissions as data, and an arena in which graders meet them."""
