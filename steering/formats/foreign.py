"""What readers and writers of foreign formats share: what a file holds, and what a user adds to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.column import Column
from steering.errors import FormatError
from steering.types import Gate, Positions, Site, SiteKind


class Counting(StrEnum):
    """What the layers that a file names count."""

    BLOCKS = "blocks"  # 0 is the first block
    HIDDEN_STATES = "hidden_states"  # 0 is the embedding, l + 1 the output of block l


@dataclass(frozen=True)
class ModelShape:
    """What a reader has to know of the model that a file was made for."""

    architecture: str  # Hugging Face's class
    num_layers: int
    heads_width: int  # of attn_heads


@dataclass(frozen=True)
class Hints:
    """What a user says of a file; what the file says itself is not asked for."""

    layers: tuple[int, ...] = ()  # blocks, counted from 0
    site: SiteKind | None = None
    attributes: tuple[str, ...] = ()
    counting: Counting | None = None  # None: as the file's names say
    model: ModelShape | None = None


@dataclass(frozen=True, eq=False)
class Foreign:
    """What a foreign file holds; `source` is what else it says, in JSON's own types."""

    columns: tuple[Column, ...]
    method: str
    positions: Positions
    source: Mapping[str, Any] = field(default_factory=dict)
    model_hint: str | None = None  # what the file calls the architecture of its model
    notes: tuple[str, ...] = ()  # what of the file was left out, a sentence each


def constant_column(attribute: str, site: Site, vector: Tensor) -> Column:
    """A vector [D] that is added to every steered activation."""
    return Column(
        attribute=attribute,
        site=site,
        gate=Gate.CONSTANT,
        vector=vector,
        gate_weight=torch.zeros_like(vector),
        gate_bias=0.0,
        keep_norm=False,
    )


def without_zeros(foreign: Foreign, path: Path) -> Foreign:
    """The same without columns whose vector is zero, which would steer nothing, and a note of where they were.

    Raises FormatError where no column would be left.
    """
    zeros = [column for column in foreign.columns if not bool(column.vector.any())]
    if not zeros:
        return foreign
    if len(zeros) == len(foreign.columns):
        raise FormatError(f"{path} holds nothing but zeros: its vectors would steer nothing")
    kept = tuple(column for column in foreign.columns if bool(column.vector.any()))
    where = ", ".join(f"{column.attribute} at {column.site}" for column in zeros)
    return replace(foreign, columns=kept, notes=(*foreign.notes, f"left out, because the vector is zero: {where}"))


def displacements(columns: Sequence[Column], multipliers: Sequence[float], target: str) -> dict[Site, Tensor]:
    """What constant columns add at each site: the sum of multiplier x vector, float64 [D], in the order of the sites.

    Columns with multiplier 0 are left out. Raises FormatError, naming `target`, for a column that adds something else
    to each activation, and where nothing is left.
    """
    moved: dict[Site, Tensor] = {}
    for column, multiplier in zip(columns, multipliers, strict=True):
        if multiplier == 0:
            continue
        if column.gate is not Gate.CONSTANT:
            raise FormatError(
                f"{target} adds one vector to every activation, but column {column.attribute!r} at {column.site} has a "
                f"{column.gate} gate, which opens more or less for each activation"
            )
        if column.clamp is not None:
            raise FormatError(
                f"{target} adds one vector to every activation, but column {column.attribute!r} at {column.site} "
                "clamps a projection, which moves each activation by another amount"
            )
        if column.keep_norm:
            raise FormatError(
                f"{target} adds one vector to every activation, but column {column.attribute!r} at {column.site} keeps "
                "the norm, which rescales each activation differently"
            )
        moved[column.site] = moved.get(column.site, 0) + multiplier * column.vector.double()
    if not moved:
        raise FormatError(f"every multiplier is 0: there is nothing for {target} to add")
    return dict(sorted(moved.items()))


def one_attribute(hints: Hints, path: Path) -> str:
    """The attribute that all vectors of a file share: as the user names it, else the name of the file."""
    if len(hints.attributes) > 1:
        raise FormatError(
            f"{path} holds one attribute, but {len(hints.attributes)} were named: {', '.join(hints.attributes)}"
        )
    return hints.attributes[0] if hints.attributes else path.resolve().name.removesuffix(path.suffix)


def need_site(hints: Hints, path: Path, why: str) -> SiteKind:
    """The user's site. Raises FormatError that asks for it, where there is none."""
    if hints.site is None:
        raise FormatError(f"{path} does not say its site: name it with --site {'|'.join(SiteKind)} ({why})")
    return hints.site


def need_layer(hints: Hints, path: Path) -> int:
    """The user's layer. Raises FormatError that asks for it, where there is none or more than one."""
    if not hints.layers:
        raise FormatError(f"{path} does not say its layer: name it with --layer, counted from 0")
    if len(hints.layers) > 1:
        raise FormatError(f"{path} holds vectors of one layer, but --layer names {named_layers(hints.layers)}")
    return hints.layers[0]


def named_layers(layers: Sequence[int]) -> str:
    """As in "1, 2, 5"."""
    return ", ".join(map(str, layers))


def refuse_place(hints: Hints, path: Path) -> None:
    """Raises FormatError for a layer or site that the user names although the file does."""
    given = {"--layer": named_layers(hints.layers), "--site": hints.site, "--counting": hints.counting}
    for name, value in given.items():
        if value:
            raise FormatError(f"{path} says itself where it acts: leave out {name} {value}")
