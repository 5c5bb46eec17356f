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
    site: Site
    strength: float


def write_places(path: Path, places: Mapping[str, Place]) -> None:
    """`{"truthfulness": {"site": "12.residual", "strength": 1.5}, ...}`"""
    write_json(path, {name: {"site": str(place.site), "strength": place.strength} for name, place in places.items()})


def read_places(path: Path) -> dict[str, Place]:
    """Raises TrainingError, naming the file, where it is not what `write_places` writes."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: Place(Site.parse(one["site"]), float(one["strength"])) for name, one in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SteeringError) as error:
        raise TrainingError(
            f"{path} does not hold places as `matsteer sweep --alone` writes them: {error!r}."
        ) from None
