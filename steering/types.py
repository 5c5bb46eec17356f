"""The nouns of steering, all but the column itself: where it acts and how, and what one row of a batch asks for.

No tensors here: a process without a model needs no PyTorch.
"""

import hashlib
import itertools
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Self, TypeVar

import numpy as np

from steering.errors import ColumnError

FLOAT32_MAX = float(np.finfo(np.float32).max)
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
        object.__setattr__(self, "kind", member(SiteKind, self.kind, "site kind"))

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind.value}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The site that `text` names, as in "14.attn_output". Raises ColumnError."""
        layer, dot, kind = text.partition(".")
        if not dot or not (layer.isascii() and layer.isdigit()):
            raise ColumnError(f"a site is written LAYER.KIND, as in 14.attn_output, not {text!r}")
        return cls(int(layer), member(SiteKind, kind, "site kind"))


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
                summed[slot] = summed.get(slot, 0.0) + finite(value, f"multiplier of {attribute!r}")
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


def member(kind: type[E], value: str, what: str) -> E:
    """Raises ColumnError."""
    try:
        return kind(value)
    except ValueError:
        raise ColumnError(f"{what} must be one of {', '.join(kind)}, not {value!r}") from None


def finite(value: float, what: str) -> float:
    """Raises ColumnError."""
    number = float(value)
    if not math.isfinite(number) or abs(number) > FLOAT32_MAX:
        raise ColumnError(f"{what} must be a finite float32 number, not {number!r}")
    return number


def bounded(value: float, what: str) -> float:
    """Raises ColumnError."""
    number = float(value)
    if not abs(number) <= LARGEST:  # NaN is not
        raise ColumnError(f"{what} must be at most {LARGEST:g} in size, not {number:g}")
    return number


def _float32(value: float) -> float:
    return float(np.float32(finite(value, "sum of multipliers")))
