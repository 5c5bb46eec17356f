"""Which checkpoints are loaded and active, kept in a file beside them for the next start."""

import json
import logging
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)
NAME = ".served.json"
LARGEST = 2**18  # bytes


@dataclass(frozen=True)
class RegistryState:
    """Checkpoints as NAME@VERSION."""

    model: str = ""  # the served model: a state of another one is of no use
    active: str | None = None
    loaded: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)  # what a plain name stands for


def read_state(root: Path, model: str) -> RegistryState:
    """The state in the folder `root`; empty where there is none, it is of another model, or its file is damaged."""
    path = root / NAME
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:  # to open a pipe would wait for ever
            raise ValueError(f"it is not a file of {LARGEST} bytes at most")
        stored = json.loads(path.read_text(encoding="utf-8"))
        state = RegistryState(
            str(stored["model"]),
            None if stored["active"] is None else str(stored["active"]),
            tuple(dict.fromkeys(map(str, stored["loaded"]))),
            {str(name): str(version) for name, version in stored["meant"].items()},
        )
    except FileNotFoundError:
        return RegistryState(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read, and is passed over: %r", path, error)
        return RegistryState(model)
    return state if state.model == model else RegistryState(model)


def write_state(root: Path, state: RegistryState) -> None:
    """Replaces the file atomically; one call at a time. A folder that cannot be written is a warning: the server goes
    on."""
    path = root / NAME
    draft = path.with_suffix(f".{os.getpid()}")
    fields = {"model": state.model, "active": state.active, "loaded": state.loaded, "meant": state.versions}
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(fields, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        log.warning("what is served will not be restored after a restart: %s", error)
