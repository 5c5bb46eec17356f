"""Where each attribute is steered and how strongly, as a sweep has found it: a file between `sweep` and `train`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steering.errors import SteeringError
from steering.types import Site
from training.errors import TrainingError
from training.files import write_json


@dataclass(frozen=True)
class Place:
    """The sites at which an attribute has a column each, and the factor on their vectors."""

    sites: tuple[Site, ...]
    strength: float


def write_places(path: Path, places: Mapping[str, Place]) -> None:
    """`{"truthfulness": {"sites": ["12.residual"], "strength": 1.5}, ...}`"""
    stored = {
        name: {"sites": [*map(str, place.sites)], "strength": round(place.strength, 4)}
        for name, place in places.items()
    }
    write_json(path, stored)


def read_places(path: Path) -> dict[str, Place]:
    """Raises TrainingError, naming the file, where it is not what `write_places` writes."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Place(tuple(map(Site.parse, one["sites"])), float(one["strength"])) for name, one in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SteeringError) as error:
        raise TrainingError(
            f"{path} does not hold places as `matsteer sweep --alone` writes them: {error!r}."
        ) from None
