"""The tensors of a checkpoint: columns stacked by site kind, and taken apart again with every check."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steering.checkpoint_config import CheckpointConfig, ReadingConfig
from steering.column import Column
from steering.errors import CheckpointError
from steering.types import Clamp, Reading, Site, SiteKind

PARTS = ("vectors", "gate_weights", "gate_biases")


def pack(columns: Sequence[Column]) -> dict[str, Tensor]:
    """vectors and gate_weights [C, D], gate_biases [C]; where widths differ, each under "<site kind>." for itself."""
    one_width = len({column.width for column in columns}) == 1
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault("" if one_width else f"{column.site.kind}.", []).append(column)
    tensors = {}
    for prefix, group in groups.items():
        if len({column.width for column in group}) > 1:
            raise CheckpointError(f"the columns at {prefix[:-1]} have different widths")
        tensors[f"{prefix}vectors"] = torch.stack([column.vector for column in group])
        tensors[f"{prefix}gate_weights"] = torch.stack([column.gate_weight for column in group])
        tensors[f"{prefix}gate_biases"] = torch.tensor([column.gate_bias for column in group])
    return tensors


def unpack(config: CheckpointConfig, tensors: dict[str, Tensor]) -> tuple[Column, ...]:
    prefixes = ["" if "vectors" in tensors else f"{column.site}." for column in config.columns]
    _check_tensors(prefixes, tensors)
    taken: dict[str, int] = {}
    columns = []
    for prefix, column in zip(prefixes, config.columns, strict=True):
        i = taken[prefix] = taken.get(prefix, -1) + 1
        vector, weight, bias = (tensors[prefix + part][i] for part in PARTS)
        columns.append(
            Column(
                attribute=column.attribute,
                site=Site(column.layer, column.site),
                gate=column.gate,
                vector=vector,
                gate_weight=weight,
                gate_bias=float(bias),
                keep_norm=config.normalize,
                default_multiplier=column.default_multiplier,
                range=column.range,
                clamp=Clamp(column.clamp.value, column.clamp.origin) if column.clamp else None,
                reads=_reading(column.reads),
            )
        )
    return tuple(columns)


def _reading(reads: ReadingConfig | None) -> Reading | None:
    return Reading(Site(reads.layer, reads.site), reads.latched) if reads else None


def _check_tensors(prefixes: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    expected = {prefix + part for prefix in prefixes for part in PARTS}
    if tensors.keys() != expected:
        raise CheckpointError(f"the tensors are {sorted(tensors)}, not {sorted(expected)}")
    for prefix in dict.fromkeys(prefixes):
        count, width = prefixes.count(prefix), tensors[prefix + "vectors"].shape[-1:]
        for part, shape in zip(PARTS, [(count, *width), (count, *width), (count,)], strict=True):
            tensor = tensors[prefix + part]
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{prefix}{part} has shape {list(tensor.shape)}, not {list(shape)}")
            if tensor.dtype != torch.float32:
                raise CheckpointError(f"{prefix}{part} is {tensor.dtype}, not float32")
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{prefix}{part} holds values that are not finite")


def check_widths(config: CheckpointConfig, columns: Sequence[Column]) -> None:
    width = config.base_model.hidden_size
    for column in columns:
        if column.site.kind is not SiteKind.ATTN_HEADS and column.width != width:
            raise CheckpointError(
                f"column {column.attribute!r} at {column.site} has width {column.width}, the base model {width}"
            )
