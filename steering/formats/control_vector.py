"""Control vectors of repeng and llama.cpp: a GGUF file with a tensor `direction.{layer}` for each steered layer.

Layers are counted from 0, and a direction is added to the output of its block: repeng wraps the block of that index,
llama.cpp's loader and its graph each subtract one, which cancels. llama.cpp steers every block but the first, and
refuses a file with `direction.0`. Both add the directions at every position.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from steering.checkpoint import Checkpoint
from steering.errors import FormatError
from steering.formats.foreign import Foreign, Hints, constant_column, displacements, one_attribute, refuse_place
from steering.types import Positions, Site, SiteKind

ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(0|[1-9]\d*)")


def read(path: Path, hints: Hints) -> Foreign:
    """One constant column on `residual` a layer, all of one attribute. Raises FormatError."""
    refuse_place(hints, path)
    reader = _open(path)
    if (architecture := _text(reader, "general.architecture")) != ARCHITECTURE:
        raise FormatError(f"{path} is a GGUF file of architecture {architecture!r}, not a control vector")
    attribute = one_attribute(hints, path)
    columns = []
    for tensor in reader.tensors:
        found = DIRECTION.fullmatch(tensor.name)
        if not found:
            raise FormatError(f"{path} holds {tensor.name!r}; a control vector holds direction.LAYER tensors only")
        if tensor.tensor_type.name not in ("F32", "F16") or tensor.data.ndim != 1:
            raise FormatError(
                f"{tensor.name} in {path} must be a vector of F32 or F16, not {tensor.tensor_type.name} of shape "
                f"{list(tensor.data.shape)}"
            )
        vector = torch.from_numpy(tensor.data.astype("float32"))
        columns.append(constant_column(attribute, Site(int(found[1]), SiteKind.RESIDUAL), vector))
    if not columns:
        raise FormatError(f"{path} holds no directions")
    columns.sort(key=lambda column: column.site)
    return Foreign(
        tuple(columns), "control_vector", Positions.ALL, model_hint=_text(reader, f"{ARCHITECTURE}.model_hint")
    )


def write(path: Path, checkpoint: Checkpoint, multipliers: Sequence[float]) -> None:
    """One direction a layer: the sum of multiplier x vector over all attributes.

    Raises FormatError for a column that no control vector can hold, ColumnError for wrong multipliers.
    """
    moved = displacements(checkpoint.columns, multipliers, "a control vector")
    for site in moved:
        if site.kind is not SiteKind.RESIDUAL:
            raise FormatError(f"a control vector acts on residual, the output of a block, not at {site}")
        if site.layer == 0:
            raise FormatError("llama.cpp never steers the block with index 0, and refuses a control vector that does")
    gguf = _library()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type(checkpoint.config.base_model.architecture))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(moved))
        for site, vector in moved.items():
            writer.add_tensor(f"direction.{site.layer}", vector.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def model_type(architecture: str) -> str:
    """Hugging Face's short name of an architecture, as in llama for LlamaForCausalLM: repeng's `model_hint`."""
    import transformers

    config_class = getattr(getattr(transformers, architecture, None), "config_class", None)
    return str(getattr(config_class, "model_type", None) or architecture)


def _library() -> ModuleType:
    try:
        import gguf
    except ModuleNotFoundError:
        raise FormatError("GGUF files need the package gguf: pip install 'gguf>=0.17'") from None
    library: ModuleType = gguf
    return library


def _open(path: Path) -> Any:
    library = _library()
    try:
        return library.GGUFReader(path)
    except Exception as error:  # a malformed file may fail at any point of the reader
        raise FormatError(f"{path} is not a sound GGUF file: {error}") from None


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else bytes(field.parts[-1]).decode("utf-8", "replace")
