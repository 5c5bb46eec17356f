"""What is in a file of tensors, whatever wrote it: PyTorch, NumPy, safetensors or JSON. No code in it is run."""

import json
import zipfile
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from steering.errors import FormatError
from steering.files import beginning
from steering.formats.pickles import load_pickle, refuse_mistaken


class Container(StrEnum):
    """What wrote a file."""

    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    NPY = "npy"
    NPZ = "npz"
    JSON = "json"
    TORCH = "torch"


def container_of(path: Path) -> Container:
    """By the content of the file, not by its name. Raises FormatError for none, and for what is something else."""
    if not path.is_file():
        raise FormatError(f"there is no file {path}")
    refuse_mistaken(path)
    try:
        first = beginning(path)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    if first.startswith(b"GGUF"):
        return Container.GGUF
    if first.startswith(b"\x93NUMPY"):
        return Container.NPY
    if first.startswith(b"PK\x03\x04"):
        return Container.NPZ if _is_npz(path) else Container.TORCH
    if first[8:9] == b"{" or path.suffix == ".safetensors":
        return Container.SAFETENSORS
    if first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") or path.suffix == ".json":
        return Container.JSON
    return Container.TORCH


def read_contents(path: Path) -> tuple[Any, Mapping[str, str]]:
    """The tensors, arrays, lists and plain values of a file, and what its header says beside. Raises FormatError."""
    match container_of(path):
        case Container.SAFETENSORS:
            return read_safetensors(path)
        case Container.NPY | Container.NPZ:
            return _numpy(path), {}
        case Container.JSON:
            return _json(path), {}
        case Container.TORCH:
            return load_pickle(path), {}
    raise FormatError(f"{path} is a GGUF file, which is read as a control vector only (--format gguf)")


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by name, and the file's metadata. Raises FormatError."""
    refuse_mistaken(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a safetensors file: {error}") from None


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _numpy(path: Path) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise FormatError(
                f"{path} holds Python objects, not numbers: they are a pickle, whose code is not run; save the arrays "
                "by themselves, with numpy.savez"
            ) from None
        raise FormatError(f"{path} cannot be read: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no sound JSON: {error}") from None
