"""The checkpoint folder: `steering.safetensors`, `README.md` and, last, `config.json`, whose presence means complete.

Nothing here unpickles. A folder that is not exactly what was saved is refused with one sentence.
"""

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from torch import nn

from steering.checkpoint_config import (
    NAME_PATTERN,
    BaseModelInfo,
    CheckpointConfig,
    ColumnConfig,
    describe,
    parse,
    plain,
    sentence,
)
from steering.checkpoint_tensors import check_widths, pack, unpack
from steering.column import Column, multipliers_of
from steering.errors import CheckpointError, CheckpointMismatch, ColumnError, NotFound
from steering.files import mistaken_for
from steering.sites import hidden_size, layers, site_width
from steering.types import Positions

__all__ = [
    "BaseModelInfo",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointMismatch",
    "ColumnConfig",
    "NotFound",
    "base_model_info",
    "find",
    "is_being_written",
    "list_checkpoints",
    "load",
    "save",
    "unreadable",
    "verify_against",
    "verify_sites",
]

CONFIG, TENSORS, CARD = "config.json", "steering.safetensors", "README.md"
NAME = re.compile(NAME_PATTERN)
# No file that is larger is read, in bytes.
MAX_CONFIG, MAX_TENSORS = 4 * 2**20, 256 * 2**20
MAX_HEADER = 2**16  # of a safetensors file, bytes
WIDEST = 8  # how much wider than the hidden size a site may be: heads x head_dim of known models is 4 times at most
LONGEST_SAVE = 60.0  # seconds from the last file that `save` writes to the last one that it puts in its place


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded checkpoint; `columns` are in the order of `config.columns`."""

    config: CheckpointConfig
    columns: tuple[Column, ...]

    @property
    def attributes(self) -> dict[str, float]:
        """Attribute -> default multiplier, in the order of the columns; several columns may share an attribute."""
        return {column.attribute: column.default_multiplier for column in self.columns}

    def multipliers(self, attributes: Mapping[str, float]) -> tuple[float, ...]:
        """The multiplier of each column (`multipliers_of`). Raises ColumnError for an unknown attribute."""
        return multipliers_of(self.columns, attributes)


def save(
    folder: Path,
    *,
    name: str,
    version: str,
    method: str,
    base_model: BaseModelInfo,
    columns: Sequence[Column],
    normalize: bool,
    positions: Positions,
    training: dict[str, Any],
    evaluation: dict[str, Any],
    card: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Writes a checkpoint folder (`checkpoints/<name>/<version>`), `config.json` last, and loads it back.

    Every file is written beside its place, flushed to disk and renamed, so that a crash leaves either the checkpoint
    that was there, an incomplete folder without `config.json`, or the new checkpoint. `extra_files` (name -> content)
    are written with it. In `training` and `evaluation` numbers that are not finite become null, since JSON has none.
    Raises CheckpointError.
    """
    for column in columns:
        if column.keep_norm != normalize:
            raise CheckpointError(
                f"column {column.attribute!r} has keep_norm {column.keep_norm}, normalize is {normalize}"
            )
    data = safetensors.torch.save(pack(columns))
    try:
        config = CheckpointConfig(
            format_version=1,
            name=name,
            version=version,
            method=method,
            base_model=base_model,
            columns=[describe(column) for column in columns],
            normalize=normalize,
            positions=Positions(positions),
            training=plain(training, "training"),
            evaluation=plain(evaluation, "evaluation"),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except ValidationError as error:
        raise CheckpointError(f"checkpoint {name!r} cannot be saved: {sentence(error)}") from None
    check_widths(config, columns)
    fields = config.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps(fields, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for file, size, most in ((CONFIG, len(text.encode()), MAX_CONFIG), (TENSORS, len(data), _most_bytes(config))):
        if size > most:
            raise CheckpointError(f"checkpoint {name!r} cannot be saved: {file} would have {size} bytes, over {most}")
    try:
        parse(text.encode())
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {name!r} cannot be saved: {CONFIG} {error}") from None
    try:
        _write(folder, {**(extra_files or {}), TENSORS: data, CARD: card.encode(), CONFIG: text.encode()})
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    return load(folder)


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint folder and checks all of it: sizes, before anything is read, then format, hash, names, shapes,
    dtypes, widths, finite values.

    Raises CheckpointError with one sentence that says what is wrong.
    """
    config = _read_config(folder)
    data = _read(folder, TENSORS, _most_bytes(config))
    if hashlib.sha256(data).hexdigest() != config.sha256:
        if what := mistaken_for(folder / TENSORS):
            raise CheckpointError(f"{folder / TENSORS} is {what}")
        raise CheckpointError(f"{folder / TENSORS} is not the file that config.json describes: its sha256 differs")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser raises its own type for each way of being malformed
        raise CheckpointError(f"{folder / TENSORS} is not a safetensors file: {error}") from None
    try:
        columns = unpack(config, tensors)
        check_widths(config, columns)
    except (CheckpointError, ColumnError) as error:
        raise CheckpointError(f"{folder} is refused: {error}") from None
    return Checkpoint(config, columns)


def base_model_info(model: nn.Module, id: str, revision: str | None) -> BaseModelInfo:
    """What a checkpoint stores of a loaded Hugging Face model. Raises UnsupportedArchitecture."""
    return BaseModelInfo(
        id=id,
        revision=revision,
        architecture=type(model).__name__,
        hidden_size=hidden_size(model),
        num_layers=len(layers(model)),
    )


def verify_against(checkpoint: Checkpoint, model_info: BaseModelInfo) -> None:
    """Raises CheckpointMismatch where the checkpoint was trained on another architecture, width or depth."""
    trained = checkpoint.config.base_model
    for what in ("architecture", "hidden_size", "num_layers"):
        theirs, ours = getattr(trained, what), getattr(model_info, what)
        if theirs != ours:
            raise CheckpointMismatch(
                f"checkpoint {checkpoint.config.name}@{checkpoint.config.version} was trained on {trained.id} with "
                f"{what} {theirs}, but {model_info.id} has {what} {ours}"
            )


def verify_sites(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises CheckpointMismatch where a column is not as wide as its site, UnsupportedArchitecture for no such site."""
    for column in checkpoint.columns:
        for site in (column.site, *([column.reads.site] if column.reads else ())):
            width = site_width(model, site.kind)
            if column.width != width:
                raise CheckpointMismatch(
                    f"column {column.attribute!r} of checkpoint {checkpoint.config.name} has width {column.width}, "
                    f"but site {site} of the model has width {width}"
                )


def list_checkpoints(root: Path) -> list[tuple[str, str, Path]]:
    """(name, version, folder) of every complete folder root/name/version, by name, then oldest version first.

    Versions are ordered as people read them: v2 before v10. A name or version that is not plain, and anything that
    leads out of `root` through a symbolic link, is passed over. A folder that may not be looked into is listed: `load`
    says so.
    """
    real = root.resolve()
    found = [
        (named.name, folder.name, folder)
        for named in _plain_entries(root)
        for folder in _plain_entries(named)
        if _is_complete(folder, real)
    ]
    return sorted(found, key=lambda entry: (entry[0], _natural(entry[1])))


def _plain_entries(folder: Path) -> list[Path]:
    """What has a plain name in it; nothing where it is no folder, is gone by now, or may not be read."""
    try:
        return [folder / name for name in os.listdir(folder) if NAME.fullmatch(name)]
    except OSError:
        return []


def _is_complete(folder: Path, root: Path) -> bool:
    config = folder / CONFIG
    try:
        inside = folder.resolve().is_relative_to(root) and config.resolve().parent == folder.resolve()
        return inside and stat.S_ISREG(config.stat().st_mode)
    except PermissionError:
        return True
    except (OSError, RuntimeError):  # the second for links in a circle, before Python 3.13
        return False


def find(root: Path, name: str, version: str | None = None) -> Path:
    """The folder of a version, or of the latest one. Raises NotFound for anything that `list_checkpoints` lacks."""
    folders = [path for n, v, path in list_checkpoints(root) if n == name and version in (None, v)]
    if not folders:
        raise NotFound(f"there is no checkpoint {name!r}" + (f" in version {version!r}" if version is not None else ""))
    return folders[-1]


def _read_config(folder: Path) -> CheckpointConfig:
    raw = _read(folder, CONFIG, MAX_CONFIG)
    try:
        return parse(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG} {error}") from None


def unreadable(root: Path, name: str) -> str | None:
    """Why it cannot be told which versions of that name there are; None: it can, or there is nothing of that name."""
    try:
        os.listdir(root)
        if NAME.fullmatch(name):
            os.listdir(root / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    return None


def is_being_written(root: Path, name: str, version: str | None = None, within: float = LONGEST_SAVE) -> bool:
    """Whether `save` is replacing a version, or any of that name, so that it is not complete for a moment: whether it
    has begun to `within` so many seconds. One that was killed leaves the same files for ever."""
    if not NAME.fullmatch(name) or (version is not None and not NAME.fullmatch(version)):
        return False
    staged = (root / name).glob(f"{version or '*'}/.{CONFIG}.*.tmp")
    try:
        return any(
            not (path.parent / CONFIG).exists() and abs(time.time() - path.stat().st_mtime) <= within for path in staged
        )
    except OSError:  # gone while it was looked for, or not to be looked into
        return False


def _most_bytes(config: CheckpointConfig) -> int:
    """The size that the tensors of these columns cannot exceed."""
    widest = WIDEST * config.base_model.hidden_size
    return min(MAX_TENSORS, MAX_HEADER + len(config.columns) * 4 * (2 * widest + 1))


def _read(folder: Path, name: str, most: int) -> bytes:
    path = folder / name
    try:
        if path.is_symlink() and path.resolve().parent != folder.resolve():
            raise CheckpointError(f"{path} is a symbolic link out of its folder")
        if not _is_file(path):
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise CheckpointError(f"{path} has {size} bytes; it can have {most} at most")
            return file.read(size)
    except (OSError, RuntimeError) as error:  # the second for links in a circle, before Python 3.13
        why = error.strerror if isinstance(error, OSError) else "it is a symbolic link in a circle"
        raise CheckpointError(f"{path} cannot be read: {why}") from error


def _is_file(path: Path) -> bool:
    """Raises PermissionError where that may not be known."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files beside their places, then puts them there in order, with no config.json until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, data in files.items():
            with staged[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        (folder / CONFIG).unlink(missing_ok=True)
        for name, path in staged.items():
            _flush(folder)  # so that a crash cannot keep the last rename and lose the ones before
            path.replace(folder / name)
        _flush(folder)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _natural(version: str) -> list[tuple[int, int, str]]:
    """A sort key under which runs of digits count as numbers."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", version)]
