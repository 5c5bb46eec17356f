"""`matsteer checkpoints`: folders listed, shown and verified; other tools' files imported and exported."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from server.config import Settings, load_settings
from server.errors import BadRequest, UnknownCheckpoint, UnusableCheckpoint
from server.terminal import terminal
from steering import checkpoint as folders
from steering.checkpoint import Checkpoint
from steering.column import Column
from steering.errors import CheckpointError, FormatError, ModelError, NotFound, SteeringError
from steering.formats import Counting, Format, Hints, ModelShape, detect, read_foreign, write_foreign
from steering.formats.card import render
from steering.sites import layers, site_module, site_width, text_config
from steering.types import Clamp, Positions, SiteKind


def list_folders(root: Path) -> None:
    """Prints a table of every complete folder."""
    table = Table("checkpoint", "method", "base model", "sites", "attributes (default multiplier)")
    found = folders.list_checkpoints(root)
    for name, version, folder in found:
        try:
            checkpoint = folders.load(folder)
        except CheckpointError as error:
            table.add_row(Text(f"{name}@{version}"), Text(f"cannot be loaded: {error}"), "", "", "")
            continue
        config = checkpoint.config
        cells = (f"{name}@{version}", config.method, config.base_model.id, _sites(checkpoint), _defaults(checkpoint))
        table.add_row(*map(Text, cells))  # as text: brackets in them are no markup
    if found:
        terminal().print(table)
    else:
        typer.echo(f"There are no checkpoints in {root}.")


def show_folder(root: Path, reference: str) -> None:
    """Prints what a checkpoint is, then its model card. Raises UnknownCheckpoint, UnusableCheckpoint."""
    folder = _find(root, reference)
    checkpoint = open_folder(root, reference)
    config = checkpoint.config
    table = Table(show_header=False)
    for label, value in (
        ("checkpoint", f"{config.name}@{config.version}"),
        ("method", config.method),
        ("base model", f"{config.base_model.id} ({config.base_model.architecture})"),
        ("sites", _sites(checkpoint)),
        ("positions", config.positions.value),
        ("attributes", _defaults(checkpoint)),
        ("sha256", config.sha256),
    ):
        table.add_row(label, Text(value))
    terminal().print(table)
    card = folder / "README.md"
    if card.is_file():
        typer.echo(card.read_text(encoding="utf-8", errors="replace"))


def open_folder(root: Path, reference: str) -> Checkpoint:
    """The checkpoint NAME or NAME@VERSION. Raises UnknownCheckpoint, UnusableCheckpoint."""
    try:
        return folders.load(_find(root, reference))
    except CheckpointError as error:
        raise UnusableCheckpoint(f"{reference}: {error}.") from error


def verify_folders(settings: Settings, reference: str | None, *, against: bool) -> bool:
    """Check one or all; prints a line each and says whether all are sound."""
    root = settings.checkpoints
    chosen: Sequence[Path] = (
        [_find(root, reference)] if reference else [folder for _, _, folder in folders.list_checkpoints(root)]
    )
    unfinished = [] if reference else sorted({path.parent for path in root.glob(f"*/*/{folders.TENSORS}")} - {*chosen})
    if not chosen and not unfinished:
        raise UnknownCheckpoint(f"There are no checkpoints in {root}.")
    for folder in unfinished:
        complete = (folder / folders.CONFIG).is_file()
        why = "its name is not plain, or it lies elsewhere" if complete else f"incomplete, there is no {folders.CONFIG}"
        typer.echo(f"{folder.parent.name}@{folder.name}: {why}")
    fits = _fits(settings) if against else None
    sound = not unfinished
    for folder in chosen:
        label = f"{folder.parent.name}@{folder.name}"
        try:
            checkpoint = folders.load(folder)
            if fits is not None:
                fits(checkpoint)
        except CheckpointError as error:
            sound = False
            typer.echo(f"{label}: {error}")
        else:
            typer.echo(f"{label}: sound")
    return sound


def _fits(settings: Settings) -> Callable[[Checkpoint], None]:
    from server.loading import load_model
    from server.registry import fits_model

    return fits_model(load_model(settings).model, settings.served_name, settings.revision)


def _find(root: Path, reference: str) -> Path:
    name, at, version = reference.partition("@")
    try:
        return folders.find(root, name, version if at else None)
    except NotFound:
        raise UnknownCheckpoint(f"There is no checkpoint {reference!r} in {root}.") from None


def _sites(checkpoint: Checkpoint) -> str:
    return ", ".join(dict.fromkeys(str(column.site) for column in checkpoint.columns))


def _defaults(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in checkpoint.attributes.items())


@dataclass(frozen=True)
class ImportOptions:
    """What `checkpoints import` was asked for."""

    source: Path
    model: str
    out: Path
    format: str = "auto"
    layers: tuple[int, ...] = ()
    site: str | None = None
    attributes: tuple[str, ...] = ()
    version: str | None = None
    positions: str | None = None
    revision: str | None = None
    overwrite: bool = False
    counting: str | None = None
    clamp: float | None = None


def import_file(options: ImportOptions) -> None:
    """Writes the checkpoint folder OUT/VERSION. Raises BadRequest, with one sentence, for whatever does not fit."""
    try:
        checkpoint = _imported(options)
    except SteeringError as error:
        raise BadRequest(f"{error}.") from error
    defaults = ", ".join(checkpoint.attributes)
    typer.echo(f"wrote {options.out / checkpoint.config.version}: {len(checkpoint.columns)} columns, {defaults}")


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
    from transformers import AutoModelForCausalLM

    from steering.pretrained import open_config

    trust = load_settings().trust_remote_code
    try:
        config = open_config(id, revision=revision, trust_remote_code=trust)
    except ModelError as error:
        raise BadRequest(str(error)) from error
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises dozens of kinds, with pages of text
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadRequest(f"The model {id!r} cannot be made from its config: {reason}") from error


def _imported(options: ImportOptions) -> folders.Checkpoint:
    format = detect(options.source) if options.format == "auto" else Format(options.format)
    model = skeleton(options.model, options.revision)
    foreign = read_foreign(options.source, _hints(options, model), format)
    if options.clamp is not None:
        clamp = Clamp(options.clamp)
        foreign = replace(foreign, columns=tuple(replace(column, clamp=clamp) for column in foreign.columns))
    for column in foreign.columns:
        _check_column(column, model, options)
    if foreign.model_hint not in (None, text_config(model).model_type):
        typer.echo(f"note: {options.source} was made for {foreign.model_hint}, says its model_hint")
    for note in foreign.notes:
        typer.echo(f"note: {note}")
    name, version = _name_and_version(options)
    positions = Positions(options.positions) if options.positions else foreign.positions
    card = render(
        name=name,
        version=version,
        base_model=options.model,
        columns=foreign.columns,
        positions=positions,
        file=options.source.name,
        format=format.value,
    )
    origin = {"file": options.source.name, "format": format.value, "sha256": _sha256(options.source)}
    return folders.save(
        options.out / version,
        name=name,
        version=version,
        method=foreign.method,
        base_model=folders.base_model_info(model, options.model, options.revision),
        columns=foreign.columns,
        normalize=foreign.columns[0].keep_norm,
        positions=positions,
        training={"imported": origin, **foreign.source},
        evaluation={},
        card=card,
    )


def _hints(options: ImportOptions, model: Any) -> Hints:
    return Hints(
        layers=options.layers,
        site=SiteKind(options.site) if options.site else None,
        attributes=options.attributes,
        counting=Counting(options.counting) if options.counting else None,
        model=ModelShape(type(model).__name__, len(layers(model)), site_width(model, SiteKind.ATTN_HEADS)),
    )


def _check_column(column: Column, model: Any, options: ImportOptions) -> None:
    """Raises UnsupportedArchitecture for a site that the model lacks, FormatError for a column of another width."""
    site_module(model, column.site)
    if column.width != (width := site_width(model, column.site.kind)):
        raise FormatError(
            f"{options.source} holds vectors of {column.width} numbers, but {column.site} of {options.model} "
            f"has {width}"
        )


def _name_and_version(options: ImportOptions) -> tuple[str, str]:
    """The checkpoint's name and its version: the one asked for, or the next of v1, v2, ... Raises BadRequest."""
    place = options.out.resolve()
    for what, text in (("name", place.name), ("version", options.version or "v1")):
        if not folders.NAME.fullmatch(text):
            raise BadRequest(f"The {what} of a checkpoint is letters, digits, '.', '_' and '-', not {text!r}.")
    taken = {version for name, version, _ in folders.list_checkpoints(place.parent) if name == place.name}
    if options.version in taken and not options.overwrite:
        raise UnusableCheckpoint(
            f"Version {options.version!r} of {options.out} exists: choose another or --overwrite it."
        )
    free = (f"v{number}" for number in range(1, len(taken) + 2))
    return place.name, options.version or next(version for version in free if version not in taken)


def _sha256(source: Path) -> str:
    """Of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
