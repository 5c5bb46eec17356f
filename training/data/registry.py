"""Which loader reads `--data NAME=PATH`. A new data set is one small file and one line here."""

from collections.abc import Callable, Iterable
from pathlib import Path

from training.data.jsonl import load_jsonl
from training.data.records import Sample
from training.errors import DataError

Loader = Callable[[Path, str], list[Sample]]

LOADERS: dict[str, Loader] = {}
"""Data sets known by NAME; any other NAME is the attribute of a JSON lines file."""


def load_data(specs: Iterable[str]) -> list[Sample]:
    """Samples of every "NAME=PATH", in order. Raises DataError for a malformed spec or a broken file."""
    samples = [sample for spec in specs for sample in _load(spec)]
    if not samples:
        raise DataError("No data was given: name at least one NAME=PATH.")
    return samples


def _load(spec: str) -> list[Sample]:
    name, found, path = spec.partition("=")
    if not (found and name.strip() and path.strip()):
        raise DataError(f"Data must be given as NAME=PATH, got {spec!r}.")
    return LOADERS.get(name, load_jsonl)(Path(path), name)
