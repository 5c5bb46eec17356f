"""Comparisons that are run by one command and written into `docs/results`."""
