"""What was loaded and active, kept in a file beside the checkpoints, so that a restart finds it again."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)
NAME = ".served.json"


@dataclass(frozen=True)
class Served:
    """Checkpoints as NAME@VERSION."""

    model: str = ""  # what is remembered holds for this model only
    active: str | None = None
    loaded: tuple[str, ...] = ()
    meant: dict[str, str] = field(default_factory=dict)  # plain name -> version


def recall(root: Path, model: str) -> Served:
    """What a server of this model has left in the folder; a file that is damaged counts as none."""
    path = root / NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = Served(
            str(stored["model"]),
            None if stored["active"] is None else str(stored["active"]),
            tuple(map(str, stored["loaded"])),
            {str(name): str(version) for name, version in stored["meant"].items()},
        )
    except FileNotFoundError:
        return Served(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read, and is passed over: %r", path, error)
        return Served(model)
    return found if found.model == model else Served(model)


def remember(root: Path, served: Served) -> None:
    """Replaces the file at once. A folder that cannot be written is a warning: the server serves all the same."""
    path = root / NAME
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        draft.write_text(json.dumps(asdict(served), indent=2) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        log.warning("what is served will not be restored after a restart: %s", error)
