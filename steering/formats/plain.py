"""One safetensors file with a checkpoint's three tensors, and its `config.json` as metadata.

A file without the metadata is read too: `vectors` [C, D] alone are constant columns, `gate_weights` [C, D] and
`gate_biases` [C] beside them make sigmoid gates that keep the norm, as MAT-Steer's.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from steering.checkpoint import Checkpoint
from steering.checkpoint_config import describe, parse
from steering.checkpoint_tensors import PARTS, pack, unpack
from steering.column import Column
from steering.errors import CheckpointError, ColumnError, FormatError
from steering.formats.contents import read_safetensors
from steering.formats.foreign import Foreign, Hints, need_layer, need_site, one_attribute, refuse_place
from steering.formats.tensors import read as read_tensors
from steering.types import Gate, Positions, Site

CONFIG = "mat_steer_config"
SITE = "the tensors alone do not tell"


def read(path: Path, hints: Hints) -> Foreign:
    """The columns of a file, with or without metadata. Raises FormatError."""
    tensors, metadata = read_safetensors(path)
    if CONFIG not in metadata and _is_stack(tensors, hints):
        return read_tensors(path, hints)
    return _described(path, metadata[CONFIG], tensors, hints) if CONFIG in metadata else _bare(path, tensors, hints)


def is_plain(names: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file is one of these."""
    return CONFIG in metadata or ("vectors" in names and ({*names} <= {*PARTS} or bool({*PARTS[1:]} & {*names})))


def write(path: Path, checkpoint: Checkpoint, multipliers: Sequence[float]) -> None:
    """All columns as they are; the multipliers become the defaults. Raises FormatError, ColumnError."""
    columns = [
        replace(column, default_multiplier=multiplier)
        for column, multiplier in zip(checkpoint.columns, multipliers, strict=True)
    ]
    config = checkpoint.config.model_copy(update={"columns": [describe(column) for column in columns]})
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(pack(columns), partial, {CONFIG: config.model_dump_json(exclude_defaults=True)})
        os.replace(partial, path)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _is_stack(tensors: Mapping[str, Tensor], hints: Hints) -> bool:
    """Whether `vectors` alone are those of several layers, and not of several attributes."""
    vectors = tensors.get("vectors")
    if set(tensors) != {"vectors"} or vectors is None or len(hints.attributes) > 1:
        return False
    if vectors.dim() != 2:
        return True
    depths = (hints.model.num_layers, hints.model.num_layers + 1) if hints.model else ()
    return len(vectors) > 1 and (len(hints.layers) > 1 or len(vectors) in depths)


def _described(path: Path, text: str, tensors: dict[str, Tensor], hints: Hints) -> Foreign:
    refuse_place(hints, path)
    try:
        config = parse(text.encode())
    except CheckpointError as error:
        raise FormatError(f"{CONFIG} in {path} {error}") from None
    try:
        columns = unpack(config, tensors)
    except (CheckpointError, ColumnError) as error:
        raise FormatError(f"{path} is refused: {error}") from None
    if hints.attributes:
        known = list(dict.fromkeys(column.attribute for column in columns))
        if len(hints.attributes) != len(known):
            raise FormatError(f"{path} holds {len(known)} attributes, but {len(hints.attributes)} were named")
        named = dict(zip(known, hints.attributes, strict=True))
        columns = tuple(replace(column, attribute=named[column.attribute]) for column in columns)
    was = config.model_dump(mode="json", include={"name", "version", "base_model", "training", "evaluation"})
    return Foreign(columns, config.method, config.positions, {"was": was})


def _bare(path: Path, tensors: dict[str, Tensor], hints: Hints) -> Foreign:
    vectors, weights, biases = (tensors.get(part) for part in PARTS)
    gated = weights is not None
    if vectors is None or set(tensors) != set(PARTS if gated else PARTS[:1]):
        raise FormatError(f"{path} must hold {', '.join(PARTS)}, or {PARTS[0]} alone, not {', '.join(sorted(tensors))}")
    weights = torch.zeros_like(vectors) if weights is None else weights
    biases = torch.zeros(len(vectors)) if biases is None else biases
    if vectors.dim() != 2 or weights.shape != vectors.shape or biases.shape != vectors.shape[:1]:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise FormatError(f"{path} must hold vectors and gate_weights [C, D] and gate_biases [C], not {shapes}")
    names = hints.attributes or ((one_attribute(hints, path),) if len(vectors) == 1 else ())
    if len(names) != len(vectors):
        raise FormatError(f"{path} holds {len(vectors)} columns: name each with --attribute, in their order")
    site = Site(need_layer(hints, path), need_site(hints, path, SITE))
    columns = tuple(
        Column(
            attribute=name,
            site=site,
            gate=Gate.SIGMOID if gated else Gate.CONSTANT,
            vector=vectors[index],
            gate_weight=weights[index],
            gate_bias=float(biases[index]),
            keep_norm=gated,
        )
        for index, name in enumerate(names)
    )
    return Foreign(columns, "mat" if gated else "vectors", Positions.GENERATED)
