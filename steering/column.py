"""The column: one gated steering vector."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import ColumnError
from steering.types import Clamp, Gate, Reading, Site, bounded, finite, member


@dataclass(frozen=True, eq=False)
class Column:
    """One gated steering vector (arXiv 2502.12446, eq. 1-2: theta_t with its gate w_t, b_t).

    A column adds multiplier x gate x vector to an activation. With a `clamp` it sets the activation's projection on the
    vector's direction to a value instead, or goes the gate's share of the way to there; its vector is kept as a unit
    vector. Tensors are kept as float32 copies on the CPU. Norms, bias, clamp and range are at most `LARGEST` in size.
    """

    attribute: str
    site: Site
    gate: Gate
    vector: Tensor  # [D]
    gate_weight: Tensor  # [D]; unused by a constant gate
    gate_bias: float
    keep_norm: bool
    default_multiplier: float = 1.0
    range: tuple[float, float] = (-4.0, 4.0)
    clamp: Clamp | None = None  # None: the vector is added
    reads: Reading | None = None  # None: the gate reads what the column steers

    def __post_init__(self) -> None:
        name = self.attribute
        if not (isinstance(name, str) and 0 < len(name) <= 64 and name.isprintable() and name == name.strip()):
            raise ColumnError(f"attribute must be 1 to 64 printable characters, not {name!r}")
        object.__setattr__(self, "gate", member(Gate, self.gate, "gate"))
        for part in ("vector", "gate_weight"):
            what = f"{part} of column {name!r}"
            object.__setattr__(self, part, _own(getattr(self, part), what))
            bounded(float(torch.linalg.vector_norm(getattr(self, part).double())), f"the norm of {what}")
        if self.vector.shape != self.gate_weight.shape:
            raise ColumnError(
                f"column {name!r} has a vector of width {self.vector.numel()} "
                f"but a gate_weight of width {self.gate_weight.numel()}"
            )
        if self.clamp is not None:
            for number in (self.clamp.value, self.clamp.origin):
                bounded(number, f"clamp of column {name!r}")
            object.__setattr__(self, "vector", _unit(self.vector, f"vector of column {name!r}"))
        if self.reads is not None:
            if not self.reads.site < self.site:
                raise ColumnError(
                    f"the gate of column {name!r} reads {self.reads.site}, which a forward pass does not meet before "
                    f"{self.site}, the site that it steers"
                )
            if self.gate is Gate.CONSTANT:
                raise ColumnError(f"column {name!r} has a constant gate, which reads nothing, and reads a site")
        object.__setattr__(self, "gate_bias", bounded(self.gate_bias, f"gate_bias of column {name!r}"))
        object.__setattr__(self, "keep_norm", bool(self.keep_norm))
        what = f"default_multiplier of column {name!r}"
        object.__setattr__(self, "default_multiplier", finite(self.default_multiplier, what))
        low, high = (bounded(end, f"range of column {name!r}") for end in self.range)
        object.__setattr__(self, "range", (low, high))
        if not low <= self.default_multiplier <= high:
            raise ColumnError(f"{what} is {self.default_multiplier:g}, outside its range [{low:g}, {high:g}]")

    @property
    def gate_and_site(self) -> str:
        """The gate in words, with what it reads where that is another site."""
        if self.reads is None:
            return self.gate.value
        return f"{self.gate.value} of {self.reads.site}{', held' if self.reads.latched else ''}"

    @property
    def width(self) -> int:
        """D, the length of the vector."""
        return self.vector.numel()


def _own(tensor: Tensor, what: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.numel() == 0:
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ColumnError(f"{what} must be a tensor of shape [D], not {shape}")
    with torch.inference_mode(False), torch.no_grad():
        own = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(own).all()):
        raise ColumnError(f"{what} holds values that are not finite")
    return own


def _unit(vector: Tensor, what: str) -> Tensor:
    """The vector at length 1; one that has it stays the same in every bit."""
    length = float(torch.linalg.vector_norm(vector.double()))
    if not length:
        raise ColumnError(f"{what} is zero: it has no direction to clamp a projection on")
    return vector if abs(length - 1) <= 1e-6 else (vector.double() / length).float()


def attribute_names(columns: Iterable[Column]) -> tuple[str, ...]:
    """The attributes, each once, in the order of the columns."""
    return tuple(dict.fromkeys(column.attribute for column in columns))


def multipliers_of(columns: Sequence[Column], attributes: Mapping[str, float]) -> tuple[float, ...]:
    """The multiplier of each column, for `SequenceSteering.of`: that of its attribute, 0 where it is not listed.

    Raises ColumnError for an unknown attribute, listing the known ones.
    """
    known = attribute_names(columns)
    for name in attributes:
        if name not in known:
            raise ColumnError(f"there is no attribute {name!r}; there are {', '.join(known) or 'none'}")
    return tuple(float(attributes.get(column.attribute, 0.0)) for column in columns)
