"""Settings of MAT-Steer; `PAPER` has the values of arXiv 2502.12446."""

from dataclasses import dataclass, fields
from enum import StrEnum
from math import isfinite

from training.choices import GateInit, Init, Kernel, Objective
from training.errors import FitError


@dataclass(frozen=True)
class MatConfig:
    objective: Objective = Objective.BALANCED
    kernel: Kernel = Kernel.MEDIAN
    sigma: float = 2.0
    """Width of the fixed kernel, in the units of the activations."""
    init: Init = Init.DIFFERENCE
    gate_init: GateInit = GateInit.ZEROS
    l_pos: float = 0.9
    l_sparse: float = 0.1
    l_ortho: float = 1.0
    batch: int = 16
    """Positives, and as many negatives, of each attribute in a step."""
    lr: float = 1e-3
    epochs: int = 100
    joint: bool = False
    """Steer an attribute's negatives with every vector, as the paper does; False: with its own only. Where the other
    attributes are mixed within an attribute's data, joint vectors learn to cancel each other there."""
    normalize: bool = True
    """Keep the activation's norm when steering."""
    standardize: bool = True
    """Train in units of the activations' own spread, with centred gates; folded back into the columns. It changes what
    a step of the optimizer means, not which columns can be reached."""
    keep_best: bool = False
    """Return the epoch with the lowest dev MMD instead of the last."""
    patience: int | None = None
    """Stop after that many epochs without a lower dev MMD; needs dev activations."""
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

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        return {f.name: v.value if isinstance(v := getattr(self, f.name), StrEnum) else v for f in fields(self)}


PAPER = MatConfig(
    objective=Objective.PAPER,
    kernel=Kernel.FIXED,
    init=Init.NORMAL,
    l_pos=0.9,
    l_sparse=0.9,
    l_ortho=0.1,
    joint=True,
    standardize=False,
)
