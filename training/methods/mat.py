"""MAT-Steer: gated steering vectors for several attributes, learned together (arXiv 2502.12446).

What goes wrong first: an MMD^2 is at most 2 an attribute, while the penalties of the paper's objective are sums over
the batch, so closing every gate (0.00 on positives and negatives) is its cheapest solution; with a kernel much narrower
than the distances between activations, the MMD has no gradient to object with. The log shows both, a closed gate is
warned about, and the defaults (`Objective.BALANCED`, a kernel as wide as the data, vectors that start at the difference
of the means, each attribute's data steered with its own vector) avoid them.

The settings are here, which a command line lists; the losses are in `mat_model.py`, the loop in `mat_training.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite
from typing import TYPE_CHECKING

from training.errors import FitError
from training.methods.base import FitInputs, Method, MethodConfig, Preset, option

if TYPE_CHECKING:
    from steering.column import Column


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


@dataclass(frozen=True)
class MatConfig(MethodConfig):
    objective: Objective = option("How the losses are reduced.", default=Objective.BALANCED)
    kernel: Kernel = option("Of the MMD.", default=Kernel.MEDIAN)
    sigma: float = option("Width of the fixed kernel.", default=2.0)
    """In the units of the activations."""
    init: Init = option("Where the vectors start.", default=Init.DIFFERENCE)
    gate_init: GateInit = option("Where the gates start.", default=GateInit.ZEROS)
    l_pos: float = option("Weight of positive preservation.", default=0.9)
    l_sparse: float = option("Weight of sparsity.", default=0.1)
    l_ortho: float = option("Weight of orthogonality.", default=1.0)
    batch: int = option("Positives, and negatives, of an attribute in a step.", default=16)
    lr: float = option("Learning rate of Adam.", default=1e-3)
    epochs: int = option("Passes over the largest side.", default=100)
    joint: bool = option("Steer each attribute's data with every vector.", default=False)
    """As the paper does; False: an attribute's negatives are steered with its own vector only. Where the other
    attributes are mixed within an attribute's data, joint vectors learn to cancel each other there."""
    normalize: bool = True
    """Keep the activation's norm when steering."""
    standardize: bool = True
    """Train in units of the activations' own spread, with centred gates; folded back into the columns. It changes what
    a step of the optimizer means, not which columns can be reached."""
    keep_best: bool = option("Keep of each attribute the epoch with its lowest loss on dev.", default=True)
    """Instead of the last; where dev has not both sides of every attribute, the last is kept. With `joint` one epoch of
    all attributes, that of the lowest sum."""
    patience: int | None = option("Stop after so many epochs without a lower loss on dev.", default=None)
    seed: int = 0

    def __post_init__(self) -> None:
        # Settings that were stored come back as their names.
        for name, kind in (("objective", Objective), ("kernel", Kernel), ("init", Init), ("gate_init", GateInit)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("sigma", "lr"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise FitError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("l_pos", "l_sparse", "l_ortho"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise FitError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")
        for name in ("batch", "epochs"):
            if getattr(self, name) < 1:
                raise FitError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.patience is not None and self.patience < 1:
            raise FitError(f"patience must be at least 1, got {self.patience}.")


PAPER = MatConfig(
    objective=Objective.PAPER,
    kernel=Kernel.FIXED,
    init=Init.NORMAL,
    l_pos=0.9,
    l_sparse=0.9,
    l_ortho=0.1,
    joint=True,
    standardize=False,
    keep_best=False,
)
"""The values of arXiv 2502.12446, as they are written. On a model's activations they close every gate: activations lie
farther apart than sigma = 2 by far, so that the MMD has no gradient; penalties that are sums over a batch outweigh an
MMD^2 of at most 2 even where the kernel is wide enough; and vectors of norm sqrt(D) are of another size than these."""

PAPER_SCALED = replace(
    PAPER, objective=Objective.BALANCED, kernel=Kernel.MEDIAN, init=Init.DIFFERENCE, standardize=True, keep_best=True
)
"""The same weights of the penalties, batches, rate and epochs, all vectors on all data, in units of the data."""


def fit(inputs: FitInputs, config: MatConfig) -> Sequence["Column"]:
    """Site by site, the attributes of each together. Where dev lacks a side of an attribute, the log is of train."""
    from training.data.samples import Split
    from training.methods.mat_training import fit_mat

    config = replace(config, normalize=inputs.keep_norm)
    columns: list[Column] = []
    for site, names in inputs.by_site():
        train = inputs.activations.contrasts(site, Split.TRAIN, names)
        try:
            dev = inputs.activations.contrasts(site, Split.DEV, names)
        except FitError:
            if config.patience:
                raise
            dev = None
        folder = inputs.folder and inputs.folder / str(site)
        columns += fit_mat(
            train, site, config, dev=dev, folder=folder, device=inputs.device, progress=inputs.progress
        ).columns
    return columns


MAT = Method(
    name="mat",
    summary="MAT-Steer",
    title="MAT-Steer (arXiv 2502.12446): gated steering vectors, learned together",
    config=MatConfig,
    fit=fit,
    keep_norm=True,
    presets={
        "paper": Preset(PAPER, "The paper's settings as they are written; they close every gate on most models."),
        "paper_scaled": Preset(
            PAPER_SCALED, "The paper's weights, batches, rate and epochs in units of the data: gates stay open."
        ),
    },
    panel="MAT-Steer",
)
