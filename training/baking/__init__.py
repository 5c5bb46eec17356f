"""Constant columns written into a copy of a model's weights."""
