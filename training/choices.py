"""The named choices of a training, free of heavy imports so that a command line can list them at once."""

from enum import StrEnum


class Method(StrEnum):
    MAT = "mat"
    CAA = "caa"
    PROBE = "probe"


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


class Kernel(StrEnum):
    FIXED = "fixed"
    """Gaussian with the given sigma (the paper: 2)."""
    MEDIAN = "median"
    """Gaussian with, per attribute, the median distance between its activations as sigma."""
    MULTI = "multi"
    """The mean of Gaussians at 1/4, 1/2, 1, 2 and 4 times the median distance."""


class Objective(StrEnum):
    PAPER = "paper"
    """Each gate is penalised on its own attribute's data only; sums over attributes and samples, as written."""
    REFERENCE = "reference"
    """MMD divided by T; every gate is penalised on every attribute's data; penalties averaged."""
    BALANCED = "balanced"
    """Each gate on its own data, as in the paper, but averaged over samples, and each attribute's MMD as a share of
    what it is without steering: the balance depends neither on the batch size nor on the data's scale."""


class Init(StrEnum):
    DIFFERENCE = "difference"
    """Each vector starts at the difference of the means."""
    NORMAL = "normal"
    """Unit normal: norm about sqrt(D)."""
    SCALED_NORMAL = "scaled_normal"
    """Random directions with the norm of the difference of the means."""


class GateInit(StrEnum):
    ZEROS = "zeros"
    """Every gate starts at 1/2."""
    PROBE = "probe"
    """Each gate starts as a logistic probe of negative against positive."""
