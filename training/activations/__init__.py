"""Activations of labelled samples: computed, stored, imported, read."""

from enum import StrEnum


class Pool(StrEnum):
    """Which positions of a sample count. The answer's positions are those it is produced from: the last prompt token
    up to the second-to-last token of the text, exactly those that are steered in a generation."""

    MEAN = "mean"
    """One row a sample: the mean over the answer's positions."""
    LAST = "last"
    """One row a sample: the last token of the whole text, the choice of most published probes."""
    TOKENS = "tokens"
    """One row for each of the answer's positions."""
    FIRST = "first"
    """One row a sample: the last prompt token, the same for all answers to one prompt."""
