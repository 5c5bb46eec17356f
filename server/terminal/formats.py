"""Foreign files into checkpoint folders, and checkpoints into foreign files."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from server.errors import BadRequest, UnusableCheckpoint
from server.terminal.folders import open_folder
from steering import checkpoint as folders
from steering.errors import FormatError, SteeringError
from steering.formats import Format, Hints, detect, read_foreign, write_foreign
from steering.formats.card import render
from steering.sites import site_module, site_width, text_config
from steering.types import Column, Positions, SiteKind


@dataclass(frozen=True)
class Import:
    """What `checkpoints import` was asked for."""

    source: Path
    model: str
    out: Path
    format: str = "auto"
    layer: int | None = None
    site: str | None = None
    attributes: tuple[str, ...] = ()
    version: str | None = None
    positions: str | None = None
    revision: str | None = None
    overwrite: bool = False


def import_file(asked: Import) -> None:
    """Write the checkpoint folder OUT/VERSION. Raises BadRequest with one sentence for whatever does not fit."""
    try:
        checkpoint = _import(asked)
    except SteeringError as error:
        raise BadRequest(f"{error}.") from error
    defaults = ", ".join(checkpoint.attributes)
    typer.echo(f"wrote {asked.out / checkpoint.config.version}: {len(checkpoint.columns)} columns, {defaults}")


def export_folder(root: Path, reference: str, out: Path, format: str, attributes: Mapping[str, float] | None) -> None:
    """Write a checkpoint as a foreign file or folder, where there is none. Raises UnknownCheckpoint,
    UnusableCheckpoint, BadRequest."""
    if out.exists():
        raise BadRequest(f"{out} exists already.")
    checkpoint = open_folder(root, reference)
    try:
        multipliers = checkpoint.multipliers(checkpoint.attributes if attributes is None else attributes)
        write_foreign(out, checkpoint, multipliers, Format(format))
    except SteeringError as error:
        raise BadRequest(f"{reference} cannot be exported: {error}.") from error
    typer.echo(f"wrote {out}")


def skeleton(id: str, revision: str | None = None) -> Any:
    """A model without its weights, made from its config alone. Raises BadRequest."""
    try:
        config = AutoConfig.from_pretrained(id, revision=revision or "main")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises dozens of kinds, with pages of text
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadRequest(f"The model {id!r} cannot be made from its config: {reason}") from error


def _import(asked: Import) -> folders.Checkpoint:
    hints = Hints(asked.layer, SiteKind(asked.site) if asked.site else None, asked.attributes)
    format = detect(asked.source) if asked.format == "auto" else Format(asked.format)
    foreign = read_foreign(asked.source, hints, format)
    model = skeleton(asked.model, asked.revision)
    for column in foreign.columns:
        _check(column, model, asked)
    if foreign.model_hint not in (None, text_config(model).model_type):
        typer.echo(f"note: {asked.source} was made for {foreign.model_hint}, says its model_hint")
    name, version = _name(asked)
    positions = Positions(asked.positions) if asked.positions else foreign.positions
    card = render(
        name=name,
        version=version,
        base_model=asked.model,
        columns=foreign.columns,
        positions=positions,
        file=asked.source.name,
        format=format.value,
    )
    origin = {"file": asked.source.name, "format": format.value, "sha256": _digest(asked.source)}
    return folders.save(
        asked.out / version,
        name=name,
        version=version,
        method=foreign.method,
        base_model=folders.base_model_info(model, asked.model, asked.revision),
        columns=foreign.columns,
        normalize=foreign.columns[0].keep_norm,
        positions=positions,
        training={"imported": origin, **foreign.source},
        evaluation={},
        card=card,
    )


def _check(column: Column, model: Any, asked: Import) -> None:
    """Raises UnsupportedArchitecture for a site that the model lacks, FormatError for a column of another width."""
    site_module(model, column.site)
    if column.width != (width := site_width(model, column.site.kind)):
        raise FormatError(
            f"{asked.source} holds vectors of {column.width} numbers, but {column.site} of {asked.model} has {width}"
        )


def _name(asked: Import) -> tuple[str, str]:
    """The checkpoint's name and its version: the one asked for, or the next of v1, v2, ... Raises BadRequest."""
    place = asked.out.resolve()
    for what, text in (("name", place.name), ("version", asked.version or "v1")):
        if not folders.NAME.fullmatch(text):
            raise BadRequest(f"The {what} of a checkpoint is letters, digits, '.', '_' and '-', not {text!r}.")
    taken = {version for name, version, _ in folders.list_checkpoints(place.parent) if name == place.name}
    if asked.version in taken and not asked.overwrite:
        raise UnusableCheckpoint(f"Version {asked.version!r} of {asked.out} exists: choose another or --overwrite it.")
    free = (f"v{number}" for number in range(1, len(taken) + 2))
    return place.name, asked.version or next(version for version in free if version not in taken)


def _digest(source: Path) -> str:
    """Of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
