"""The named choices of a training, free of heavy imports so that a command line can list them at once."""

from dataclasses import dataclass
from enum import StrEnum

from training.activations import Pool


class Method(StrEnum):
    MAT = "mat"
    CAA = "caa"
    ACTADD = "actadd"
    PROBE = "probe"
    ITI = "iti"
    ABLATION = "ablation"
    HEAD_ABLATION = "head-ablation"
    CONTROL = "control"


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


class Direction(StrEnum):
    MEAN = "mean"
    """The difference of the two sides' means."""
    PROBE = "probe"
    """The weights of a logistic probe of positive against negative."""
    PCA = "pca"
    """The first principal component of the groups' differences."""


class Scale(StrEnum):
    """How long a control vector is at coefficient 1."""

    DIFFERENCE = "difference"
    """As far as the two sides' means lie apart along it."""
    UNIT = "unit"
    """1, as repeng's."""
    NORM = "norm"
    """The mean norm of the layer's activations."""


class Fill(StrEnum):
    """What an ablated head puts out."""

    ZERO = "zero"
    MEAN = "mean"
    """Its mean over the train split."""


@dataclass(frozen=True)
class Profile:
    """What a method is called in model cards, and what it does unless told otherwise."""

    title: str
    site: str
    pool: Pool
    keeps_norm: bool = False
    multiplier: float = 1.0


PROFILES = {
    Method.MAT: Profile("MAT-Steer (arXiv 2502.12446): gated steering vectors, learned together", "attn_output",
                          Pool.MEAN, keeps_norm=True),
    Method.CAA: Profile("difference in means (arXiv 2308.10248, 2312.06681)", "attn_output", Pool.MEAN),
    Method.ACTADD: Profile("activation addition from one pair of prompts (arXiv 2308.10248)", "residual", Pool.LAST),
    Method.PROBE: Profile("linear probe direction", "attn_output", Pool.MEAN),
    Method.ITI: Profile("inference-time intervention on the most telling heads (arXiv 2306.03341)", "attn_heads",
                          Pool.LAST, multiplier=15.0),
    Method.ABLATION: Profile("directional ablation (arXiv 2406.11717)", "residual", Pool.LAST),
    Method.HEAD_ABLATION: Profile("zero or mean ablation of attention heads", "attn_heads", Pool.MEAN),
    Method.CONTROL: Profile("control vector over many layers (arXiv 2310.01405, repeng)", "residual", Pool.LAST),
}  # fmt: skip
