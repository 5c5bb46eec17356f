"""Activations of labelled samples: computed, stored, imported, read."""

from enum import StrEnum

SINK = 5.0
"""How many times the usual norm makes an attention sink of a position (Xiao et al. 2023, arXiv 2309.17453; Sun et al.
2024, arXiv 2402.17762): what a language model has there says next to nothing of the text."""


class Pool(StrEnum):
    """Which positions of a sample count. The answer's positions are those it is produced from: the last prompt token
    up to the second-to-last token of the text, exactly those that are steered in a generation. Attention sinks do not
    count: never the first position of a text, and of several none whose norm is far beyond that of the others;
    `LAST` and `FIRST` take the one position that they name, whatever its norm."""

    MEAN = "mean"
    """One row a sample: the mean over the answer's positions."""
    LAST = "last"
    """One row a sample: the last token of the whole text, the choice of most published probes."""
    TOKENS = "tokens"
    """One row for each of the answer's positions."""
    FIRST = "first"
    """One row a sample: the last prompt token, the same for all answers to one prompt."""
