"""The nouns of steering: where a column acts, what it is, and what one row of a batch asks for."""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from steering.errors import ColumnError

FLOAT32_MAX = torch.finfo(torch.float32).max
# Of a column's norms, bias and multipliers: with more, products of them would leave float32 on real activations.
LARGEST = 1e9
E = TypeVar("E", bound=StrEnum)


class SiteKind(StrEnum):
    """The place within a decoder block. Alphabetical order is the order in which a forward pass meets them."""

    ATTN_HEADS = "attn_heads"
    ATTN_OUTPUT = "attn_output"
    MLP_OUTPUT = "mlp_output"
    RESIDUAL = "residual"


class Gate(StrEnum):
    """How strongly a column acts on an activation a: sigmoid(w.a + b), 1, w.a + b, or 1 where w.a / |a| + b > 0 and 0
    elsewhere (a threshold on the cosine, for a unit vector w)."""

    SIGMOID = "sigmoid"
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"

    @property
    def code(self) -> int:
        """The number that stands for this gate in a `kinds` tensor."""
        return _GATE_CODES[self]


_GATE_CODES = {Gate.SIGMOID: 0, Gate.CONSTANT: 1, Gate.LINEAR: 2, Gate.COSINE: 3}


class Positions(StrEnum):
    """Which tokens are steered: from the last prompt token on, the prompt, or both."""

    GENERATED = "generated"
    PROMPT = "prompt"
    ALL = "all"


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model: the block with index `layer`, and the place within it. Written "14.attn_output"."""

    layer: int
    kind: SiteKind

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ColumnError(f"layer must be a whole number of 0 or more, not {self.layer!r}")
        object.__setattr__(self, "kind", _member(SiteKind, self.kind, "site kind"))

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind.value}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The site that `text` names, as in "14.attn_output". Raises ColumnError."""
        layer, dot, kind = text.partition(".")
        if not dot or not (layer.isascii() and layer.isdigit()):
            raise ColumnError(f"a site is written LAYER.KIND, as in 14.attn_output, not {text!r}")
        return cls(int(layer), _member(SiteKind, kind, "site kind"))


@dataclass(frozen=True)
class Clamp:
    """What an activation's projection on a column's direction is set to: origin + multiplier x value."""

    value: float
    origin: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Which activations open a column's gate, where that are not those that it steers (CAST, arXiv 2409.05907)."""

    site: Site
    latched: bool = False  # read once, at the first steered token, and held for the row; else at every token


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
        object.__setattr__(self, "gate", _member(Gate, self.gate, "gate"))
        for part in ("vector", "gate_weight"):
            what = f"{part} of column {name!r}"
            object.__setattr__(self, part, _own(getattr(self, part), what))
            _bounded(float(torch.linalg.vector_norm(getattr(self, part).double())), f"the norm of {what}")
        if self.vector.shape != self.gate_weight.shape:
            raise ColumnError(
                f"column {name!r} has a vector of width {self.vector.numel()} "
                f"but a gate_weight of width {self.gate_weight.numel()}"
            )
        if self.clamp is not None:
            for number in (self.clamp.value, self.clamp.origin):
                _bounded(number, f"clamp of column {name!r}")
            object.__setattr__(self, "vector", _unit(self.vector, f"vector of column {name!r}"))
        if self.reads is not None:
            if not self.reads.site < self.site:
                raise ColumnError(
                    f"the gate of column {name!r} reads {self.reads.site}, which a forward pass does not meet before "
                    f"{self.site}, the site that it steers"
                )
            if self.gate is Gate.CONSTANT:
                raise ColumnError(f"column {name!r} has a constant gate, which reads nothing, and reads a site")
        object.__setattr__(self, "gate_bias", _bounded(self.gate_bias, f"gate_bias of column {name!r}"))
        object.__setattr__(self, "keep_norm", bool(self.keep_norm))
        what = f"default_multiplier of column {name!r}"
        object.__setattr__(self, "default_multiplier", _finite(self.default_multiplier, what))
        low, high = (_bounded(end, f"range of column {name!r}") for end in self.range)
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


@dataclass(frozen=True, eq=False)
class Handle:
    """The columns of one `ColumnBank.add`: their slots, in the order in which they were added."""

    slots: tuple[tuple[Site, int], ...]
    attributes: tuple[str, ...]
    serial: int = field(init=False, repr=False, default_factory=itertools.count().__next__)  # no other handle has it

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, eq=False)
class SequenceSteering:
    """What one row of a batch asks for: multipliers for the columns of any number of handles.

    Make it once per request with `SequenceSteering.of` and pass the same object to every `ColumnBank.fill`: equal rows
    share a line of the bank's device table, and the hash that finds it is computed once.
    """

    parts: tuple[tuple[Handle, tuple[float, ...]], ...] = ()
    slots: tuple[tuple[Site, int, float], ...] = field(init=False, repr=False)  # non-zero only, in site order
    sites: frozenset[Site] = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        summed: dict[tuple[Site, int], float] = {}
        for handle, multipliers in self.parts:
            if len(multipliers) != len(handle):
                raise ColumnError(f"{len(multipliers)} multipliers were given for {len(handle)} columns")
            for slot, attribute, value in zip(handle.slots, handle.attributes, multipliers, strict=True):
                summed[slot] = summed.get(slot, 0.0) + _finite(value, f"multiplier of {attribute!r}")
        # Rounded as the device will hold them, so that host and device agree on which are zero.
        rounded = [(slot, _float32(value)) for slot, value in sorted(summed.items())]
        slots = tuple((site, index, value) for (site, index), value in rounded if value != 0.0)
        object.__setattr__(self, "slots", slots)
        object.__setattr__(self, "sites", frozenset(site for site, _, _ in slots))
        object.__setattr__(self, "_hash", hash(self.parts))

    @classmethod
    def of(cls, parts: Iterable[tuple[Handle, Sequence[float]]]) -> Self:
        """Multipliers for each handle, in the order of its columns; a handle named twice adds up.

        Raises ColumnError for a wrong number of multipliers or one that is not finite in float32.
        """
        return cls(tuple((handle, tuple(float(value) for value in values)) for handle, values in parts))

    @property
    def handles(self) -> tuple[Handle, ...]:
        return tuple(handle for handle, _ in self.parts)

    @cached_property
    def digest(self) -> bytes:
        """Of equal steerings the same, of others another: 16 bytes to remember one by, without its handles."""
        found = hashlib.blake2b(digest_size=16)
        for handle, multipliers in self.parts:
            found.update(struct.pack(f"<Q{len(multipliers)}d", handle.serial, *multipliers))
        return found.digest()

    def without(self, handle: Handle) -> "SequenceSteering":
        """The same row, asking nothing of `handle`."""
        return SequenceSteering(tuple(part for part in self.parts if part[0] is not handle))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, SequenceSteering) and self.parts == other.parts)


UNSTEERED = SequenceSteering()


def _member(kind: type[E], value: str, what: str) -> E:
    try:
        return kind(value)
    except ValueError:
        raise ColumnError(f"{what} must be one of {', '.join(kind)}, not {value!r}") from None


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


def _finite(value: float, what: str) -> float:
    number = float(value)
    if not math.isfinite(number) or abs(number) > FLOAT32_MAX:
        raise ColumnError(f"{what} must be a finite float32 number, not {number!r}")
    return number


def _bounded(value: float, what: str) -> float:
    number = float(value)
    if not abs(number) <= LARGEST:  # NaN is not
        raise ColumnError(f"{what} must be at most {LARGEST:g} in size, not {number:g}")
    return number


def _float32(value: float) -> float:
    return float(np.float32(_finite(value, "sum of multipliers")))


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
