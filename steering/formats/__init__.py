"""Foreign files of steering vectors, read into columns and written from checkpoints: a small file each.

mat          MAT-Steer's `.pt`, both ages                           read
gguf         control vectors of repeng and llama.cpp                read, write
pyvene       pyvene's folders                                       read, write
safetensors  the three tensors of a checkpoint in one file          read, write
tensors      tensors by themselves, in a stack, or by layer         read

Nothing here runs code out of a pickle.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from steering.checkpoint import Checkpoint
from steering.errors import ColumnError, FormatError
from steering.formats import control_vector, mat, plain, pyvene, tensors
from steering.formats.contents import Container, container_of, read_safetensors
from steering.formats.foreign import Counting, Foreign, Hints, ModelShape, without_zeros
from steering.formats.pickles import load_pickle

__all__ = ["Counting", "Foreign", "Format", "Hints", "ModelShape", "detect", "read_foreign", "write_foreign"]


class Format(StrEnum):
    MAT = "mat"
    GGUF = "gguf"
    PYVENE = "pyvene"
    SAFETENSORS = "safetensors"
    TENSORS = "tensors"


Reader = Callable[[Path, Hints], Foreign]
Writer = Callable[[Path, Checkpoint, Sequence[float]], None]

READERS: Mapping[Format, Reader] = {
    Format.MAT: mat.read,
    Format.GGUF: control_vector.read,
    Format.PYVENE: pyvene.read,
    Format.SAFETENSORS: plain.read,
    Format.TENSORS: tensors.read,
}
WRITERS: Mapping[Format, Writer] = {
    Format.GGUF: control_vector.write,
    Format.PYVENE: pyvene.write,
    Format.SAFETENSORS: plain.write,
}


def read_foreign(path: Path, hints: Hints, format: Format | None = None) -> Foreign:
    """The columns of a foreign file or folder; without `format` its content decides. Raises FormatError."""
    try:
        return without_zeros(READERS[format or detect(path)](path, hints), path)
    except ColumnError as error:
        raise FormatError(f"{path} is refused: {error}") from None


def write_foreign(path: Path, checkpoint: Checkpoint, multipliers: Sequence[float], format: Format) -> None:
    """Write a checkpoint, with a multiplier for each column, as a foreign file or folder.

    Raises FormatError for what the format cannot hold, ColumnError for a multiplier outside its column's range.
    """
    if format not in WRITERS:
        raise FormatError(f"a checkpoint can be written as {', '.join(WRITERS)}, not as {format}")
    WRITERS[format](path, checkpoint, multipliers)


def detect(path: Path) -> Format:
    """The format of a file or folder, by its content. Raises FormatError."""
    if path.is_dir():
        if any(path.glob("intkey_*.bin")):
            return Format.PYVENE
        if (path / "steering.safetensors").is_file():
            raise FormatError(f"{path} is a checkpoint folder already")
        raise FormatError(f"{path} is no folder of pyvene's: it holds no intkey_*.bin; name a file in it, perhaps")
    match container_of(path):
        case Container.GGUF:
            return Format.GGUF
        case Container.SAFETENSORS:
            names, metadata = read_safetensors(path)
            return Format.SAFETENSORS if plain.is_plain(names, metadata) else Format.TENSORS
        case Container.TORCH:
            return Format.MAT if mat.is_mat(load_pickle(path)) else Format.TENSORS
        case _:
            return Format.TENSORS
