"""Checkpoint folders: listed, shown, verified."""

from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from server.config import Settings
from server.errors import UnknownCheckpoint, UnusableCheckpoint
from server.terminal import terminal
from steering import checkpoint as folders
from steering.checkpoint import Checkpoint
from steering.errors import CheckpointError, NotFound


def list_folders(root: Path) -> None:
    """A table of every complete folder."""
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
    """What a checkpoint is, then its model card. Raises UnknownCheckpoint, UnusableCheckpoint."""
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
    from server.opening.model import load_model
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
