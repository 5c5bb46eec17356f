"""Checkpoints: which folders there are, which are loaded into the bank, which is active, which requests use them."""

import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from server.engine.sequence import PositionsName
from server.engine_client import CheckpointEntry, CheckpointInfo, Form
from server.errors import (
    CheckpointInUse,
    EngineDown,
    InvalidField,
    ServerError,
    UnknownAttribute,
    UnknownCheckpoint,
    UnusableCheckpoint,
    WrongModel,
)
from server.registry_state import RegistryState
from steering import checkpoint as folders
from steering.checkpoint import Checkpoint, base_model_info, verify_against, verify_sites
from steering.column import Column
from steering.errors import CheckpointError, CheckpointMismatch, NotFound, UnsupportedArchitecture
from steering.types import Handle

log = logging.getLogger(__name__)
PREFERRED_NAME = "demo"
Key = tuple[str, str]  # name, version
# Of each file of a folder: when it was written, and last changed in any way (ns), its size (bytes) and its inode; None:
# there is no such file.
State = tuple[tuple[int, int, int, int] | None, ...]
FOLDER_GONE = "Its folder is gone or cannot be read; requests get what was loaded."
PATIENCE = 2.0  # seconds that a folder is waited for which is being written
POLL = 0.01
OnEngine = Callable[[Callable[[], Any]], "Future[Any]"]


class Bank(Protocol):
    """Where columns go: a `ColumnBank`, or those of several processes."""

    def add(self, columns: Sequence[Column]) -> Handle: ...

    def remove(self, handle: Handle) -> None: ...


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint whose columns are in the bank."""

    name: str  # of its folder, which may be a renamed copy
    version: str
    checkpoint: Checkpoint
    handle: Handle
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time, seconds

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"

    @property
    def sha256(self) -> str:
        return self.checkpoint.config.sha256

    @property
    def positions(self) -> PositionsName:
        name: PositionsName = self.checkpoint.config.positions.value
        return name

    @property
    def form(self) -> Form | None:
        """What it was trained on: "chat", "plain" text, or None where its folder does not say."""
        known: dict[object, Form] = {"chat": "chat", "plain": "plain"}
        return known.get(str(self.checkpoint.config.training.get("form")))

    @property
    def info(self) -> CheckpointInfo:
        return CheckpointInfo(self.name, self.version, self.sha256, self.created, self.defaults)

    @property
    def defaults(self) -> dict[str, float]:
        """Attribute -> default multiplier."""
        return self.checkpoint.attributes

    def latched(self, multipliers: Sequence[float]) -> str | None:
        """An attribute that these multipliers steer through a latched gate, if there is one."""
        return next(
            (
                column.attribute
                for column, multiplier in zip(self.checkpoint.columns, multipliers, strict=True)
                if multiplier and column.reads and column.reads.latched
            ),
            None,
        )

    def multipliers(self, attributes: Mapping[str, float] | None, param: str) -> tuple[float, ...]:
        """One multiplier a column. None: every column's own default; else what is not listed is 0.

        Raises UnknownAttribute (listing those there are), InvalidField for a value outside a column's range.
        """
        known = self.defaults
        asked = known if attributes is None else attributes
        for name, value in asked.items():
            if name not in known:
                raise UnknownAttribute(
                    f"Checkpoint {self.name!r} has no attribute {name!r}; it has {', '.join(known)}.",
                    param=f"{param}.{name}",
                )
            # One range holds for all columns of an attribute.
            low, high = next(column.range for column in self.checkpoint.columns if column.attribute == name)
            if value and not low <= value <= high:
                raise InvalidField(
                    f"The multiplier of {name!r} is {value:g}; it must be from {low:g} to {high:g}.",
                    param=f"{param}.{name}",
                )
        return self.checkpoint.multipliers(asked)


def fits_model(model: Any, name: str, revision: str | None) -> Callable[[Checkpoint], None]:
    """A check that raises CheckpointMismatch for a checkpoint that was not made for this model.

    Raises UnsupportedArchitecture for a model that cannot be steered at all.
    """
    info = base_model_info(model, name, revision)

    def fits(checkpoint: Checkpoint) -> None:
        verify_against(checkpoint, info)
        try:
            verify_sites(checkpoint, model)
        except UnsupportedArchitecture as error:
            raise CheckpointMismatch(str(error)) from error

    return fits


def find_folder(root: Path, name: str, version: str | None, param: str | None = None) -> Path:
    """The folder of a version, or of the newest one. Waits for one that is being written, not for one that was left
    unfinished.

    Raises UnknownCheckpoint, UnusableCheckpoint.
    """
    reference = name if version is None else f"{name}@{version}"
    until = time.monotonic() + PATIENCE
    while folders.is_being_written(root, name, version) and time.monotonic() < until:
        time.sleep(POLL)
    try:
        return folders.find(root, name, version)
    except NotFound:
        if folders.is_being_written(root, name, version, within=math.inf):
            raise UnusableCheckpoint(
                f"Checkpoint {reference!r} is being written, or was not written to its end; try again.", param=param
            ) from None
        if why := folders.unreadable(root, name):
            raise UnusableCheckpoint(f"The folder of checkpoint {name!r} cannot be read: {why}.", param=param) from None
        versions = [other for one, other, _ in folders.list_checkpoints(root) if one == name]
        known = f" Of {name!r} there are {', '.join(versions)}." if versions else _known_names(root)
        raise UnknownCheckpoint(f"There is no checkpoint {reference!r}.{known}", param=param) from None


def _known_names(root: Path) -> str:
    names = dict.fromkeys(name for name, _, _ in folders.list_checkpoints(root))
    return f" There are {', '.join(names)}." if names else ""


class Registry:
    """The checkpoints of one server. Used from several threads; changes of the bank run on the engine's thread.

    A NAME without a version means the active version of that name, else the version that was the newest when NAME was
    first asked for. It changes by `reload` and `activate` only, not when a newer folder appears or a request asks for
    another version. A checkpoint that is replaced or unloaded stays in the bank until the requests that use it end.
    """

    def __init__(
        self,
        root: Path,
        bank: Bank,
        fits: Callable[[Checkpoint], None],
        on_engine: OnEngine,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`root`: the folder of checkpoints. `fits` raises CheckpointError for one that the model cannot use.
        `on_engine` runs a function on the engine's thread. `on_change` is called after each change by `reload` and
        `unload`, and before the next one."""
        self.on_change = on_change
        self.loads = 0  # since the start: checkpoints brought to the device
        self.swaps = 0  # how often requests that name none got another checkpoint than before
        self._root = root
        self._bank = bank
        self._fits = fits
        self._on_engine = on_engine
        self._lock = threading.Lock()  # guards the four below
        self._loaded: dict[Key, LoadedCheckpoint] = {}
        self._plain_names: dict[str, Key] = {}  # the version that a name without one means
        self._users: dict[LoadedCheckpoint, int] = {}
        self._active: Key | None = None
        self._changing = threading.Lock()  # held while what is served changes and `on_change` tells of it
        self._name_locks: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._read_cache: dict[Path, tuple[State, Checkpoint | str]] = {}  # a sentence: why it cannot be read

    @property
    def active(self) -> LoadedCheckpoint | None:
        with self._lock:
            return self._loaded[self._active] if self._active else None

    @property
    def loaded(self) -> list[LoadedCheckpoint]:
        """By name and version."""
        with self._lock:
            return [self._loaded[key] for key in sorted(self._loaded)]

    @property
    def pins(self) -> int:
        """How often loaded checkpoints are in use by requests, counting each request's use of each."""
        with self._lock:
            return sum(self._users.values())

    def activate(self, reference: str) -> LoadedCheckpoint:
        """Make NAME or NAME@VERSION the one that requests get when they name none."""
        return self._activate(self.load(reference))

    def reload(self, name: str, version: str | None = None, *, activate: bool = False) -> LoadedCheckpoint:
        """Load a version (None: the newest) as its folder is now; NAME alone means this version from now on.

        A version that was loaded before and differs is replaced between two steps. After an error nothing has changed.
        Raises UnknownCheckpoint, UnusableCheckpoint, WrongModel.
        """
        with self._lock_of(name):
            folder = find_folder(self._root, name, version, "name" if version is None else "version")
            checkpoint, key = self._read_checked(folder, None), (name, folder.name)
            with self._lock:
                old = self._loaded.get(key)
            new = old if old and old.checkpoint.config == checkpoint.config else self._add_to_bank(folder, None)
            with self._changing:
                with self._lock:
                    before = self._loaded.get(self._active) if self._active else None
                    self._loaded[key], self._plain_names[name] = new, key
                    unused = self._unused([old] if old is not None and old is not new else [])
                    self._active = key if activate else self._active
                    self.swaps += self._active is not None and self._loaded[self._active] is not before
                self.on_change()
        self._remove_from_bank(unused)
        return new

    def unload(self, name: str, version: str | None = None) -> list[str]:
        """Unload a version (None: all of that name); returns NAME@VERSION of each that was loaded.

        Raises UnknownCheckpoint, CheckpointInUse for the active one.
        """
        with self._lock_of(name), self._changing:
            with self._lock:
                gone = [key for key in self._loaded if key[0] == name and version in (None, key[1])]
                if self._active in gone:
                    raise CheckpointInUse(f"Checkpoint {'@'.join(self._active)} is active; activate another one first.")
                retired = [self._loaded.pop(key) for key in gone]
                unused = self._unused(retired)
                if self._plain_names.get(name) in gone:
                    del self._plain_names[name]
            if gone:
                self.on_change()
        self._remove_from_bank(unused)
        if not gone:
            find_folder(self._root, name, version, "name" if version is None else "version")
        return [one.label for one in retired]

    def _activate(self, loaded: LoadedCheckpoint) -> LoadedCheckpoint:
        with self._lock:
            self._active = (loaded.name, loaded.version)
        return loaded

    def state(self, model: str) -> RegistryState:
        """What is loaded and active now, to be restored at the next start."""
        with self._lock:
            active = "@".join(self._active) if self._active else None
            return RegistryState(
                model, active, tuple(map("@".join, sorted(self._loaded))), dict(self._plain_names.values())
            )

    def restore(self, state: RegistryState) -> LoadedCheckpoint | None:
        """Load what was loaded; what cannot be loaded any more is a warning. Returns the active one."""
        for label in self._still_there(state.loaded):
            try:
                loaded = self.load(label)
            except ServerError as error:
                log.warning("checkpoint %s was loaded before, and cannot be now: %s", label, error.message)
                continue
            if state.versions.get(loaded.name) == loaded.version:
                with self._lock:
                    self._plain_names[loaded.name] = loaded.name, loaded.version
        try:
            return self.activate(state.active) if state.active else None
        except ServerError as error:
            log.warning("checkpoint %s was active before, and cannot be now: %s", state.active, error.message)
            return None

    def _still_there(self, labels: tuple[str, ...]) -> list[str]:
        """Those that have a folder, also one that is being written. Looked up at once, however many there are."""
        there = {f"{name}@{version}" for name, version, _ in folders.list_checkpoints(self._root)}
        found = [label for label in labels if label in there or self._is_being_written(label)]
        if gone := sorted(set(labels).difference(found)):
            more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
            log.warning("loaded before, and not there any more: %s%s", ", ".join(gone[:5]), more)
        return found

    def _is_being_written(self, label: str) -> bool:
        name, _, version = label.partition("@")
        return folders.is_being_written(self._root, name, version)

    def activate_default(self) -> LoadedCheckpoint | None:
        """The only loadable checkpoint, or the one called "demo"; None when there is no such."""
        names = {entry.name for entry in self.entries() if not entry.problem}
        if PREFERRED_NAME in names:
            return self.activate(PREFERRED_NAME)
        return self.activate(names.pop()) if len(names) == 1 else None

    def load(self, reference: str, param: str | None = None) -> LoadedCheckpoint:
        """The checkpoint NAME or NAME@VERSION; reads it and adds it to the bank where it is not loaded yet. Blocks.

        Raises UnknownCheckpoint, UnusableCheckpoint, WrongModel.
        """
        name, at, text = reference.partition("@")
        version = text if at else None
        if found := self._find_loaded(name, version):
            return found
        with self._lock_of(name):
            if found := self._find_loaded(name, version):  # loaded while this call waited
                return found
            folder = find_folder(self._root, name, version, param)
            loaded = self._find_loaded(name, folder.name) or self._add_to_bank(folder, param)
            with self._lock:
                self._loaded[name, loaded.version] = loaded
                if version is None:
                    self._plain_names[name] = name, loaded.version
            return loaded

    def _add_to_bank(self, folder: Path, param: str | None) -> LoadedCheckpoint:
        checkpoint = self._read_checked(folder, param)
        handle = self._on_engine(lambda: self._bank.add(checkpoint.columns)).result()
        with self._lock:
            self.loads += 1
        loaded = LoadedCheckpoint(folder.parent.name, folder.name, checkpoint, handle)
        log.info("loaded checkpoint %s (%d columns)", loaded.label, len(checkpoint.columns))
        return loaded

    def _lock_of(self, name: str) -> Any:
        """Held while folders of a name are read and loaded."""
        with self._lock:
            return self._name_locks.setdefault(name, threading.Lock())

    def acquire(self, reference: str | None) -> LoadedCheckpoint | None:
        """The checkpoint for a request (None: the active one), which stays in the bank until `release`. None: it is not
        loaded, and `load` would have to come first; or none is active. Does not block."""
        while True:
            loaded = self.active if reference is None else self.find_loaded(reference)
            if loaded is None:
                return None
            with self._lock:
                # Otherwise it has been replaced or unloaded since, and is looked up again.
                if self._loaded.get((loaded.name, loaded.version)) is loaded:
                    self._users[loaded] = self._users.get(loaded, 0) + 1
                    return loaded

    def release(self, loaded: LoadedCheckpoint) -> None:
        """A request that has acquired it has ended."""
        with self._lock:
            self._users[loaded] -= 1
            if self._users[loaded]:
                return
            del self._users[loaded]
            stays = self._loaded.get((loaded.name, loaded.version)) is loaded
        if not stays:
            self._remove_from_bank([loaded])

    def _unused(self, gone: Sequence[LoadedCheckpoint]) -> list[LoadedCheckpoint]:
        """Of those that leave `_loaded`, under the lock that is held: those that can leave the bank, too. The others do
        when their last user releases them."""
        return [loaded for loaded in gone if loaded not in self._users]

    def _remove_from_bank(self, gone: Sequence[LoadedCheckpoint]) -> None:
        for loaded in gone:
            try:
                self._on_engine(partial(self._bank.remove, loaded.handle))
            except EngineDown:  # and the bank with it
                return
            log.info("unloaded checkpoint %s", loaded.label)

    def entries(self, name: str | None = None) -> list[CheckpointEntry]:
        """Every complete folder, or those of one name, and what is loaded though its folder is gone. Reads files that
        have changed since the last call: it blocks. The list of all does not wait for a load: of a folder that is being
        read it says so."""
        listed = [entry for entry in folders.list_checkpoints(self._root) if name in (None, entry[0])]
        inspected: list[tuple[Checkpoint | None, str | None] | None] = []
        for found, _, folder in listed:
            lock = self._lock_of(found)
            if lock.acquire(blocking=name is not None):
                try:
                    inspected.append(self._inspect(folder))
                finally:
                    lock.release()
            else:
                inspected.append(None)
        if name is None:  # of folders that are gone nothing is kept
            for folder in self._read_cache.keys() - {folder for _, _, folder in listed}:
                self._read_cache.pop(folder, None)
        with self._lock:
            loaded, active = dict(self._loaded), self._active
        entries = []
        for (found, version, _), known in zip(listed, inspected, strict=True):
            key, served, changed = (found, version), loaded.get((found, version)), False
            checkpoint, problem = known or (None, None if served else "It is being loaded; what it holds is told then.")
            if served:
                changed = known is not None and (checkpoint is None or checkpoint.config != served.checkpoint.config)
                checkpoint = served.checkpoint
            entries.append(
                CheckpointEntry(
                    found,
                    version,
                    checkpoint.config if checkpoint else None,
                    problem,
                    loaded=bool(served),
                    changed=changed,
                    active=key == active,
                )
            )
        there = {(found, version) for found, version, _ in listed}
        for key in sorted(loaded.keys() - there):
            if name not in (None, key[0]) or _state(self._root.joinpath(*key))[0]:  # loaded since the look
                continue
            config = loaded[key].checkpoint.config
            entries.append(CheckpointEntry(*key, config, FOLDER_GONE, loaded=True, changed=True, active=key == active))
        return entries

    def has_read(self, name: str) -> bool:
        """Whether every folder of that name is known as it is now: then nothing of it is read to list it, or to load it
        once more. Looks at the files alone."""
        of_name = [folder for found, _, folder in folders.list_checkpoints(self._root) if found == name]
        cached = ((folder, self._read_cache.get(folder)) for folder in of_name)
        return all(known is not None and known[0] == _state(folder) for folder, known in cached)

    def find_loaded(self, reference: str) -> LoadedCheckpoint | None:
        """What NAME or NAME@VERSION means now; None: it is not loaded."""
        name, at, version = reference.partition("@")
        return self._find_loaded(name, version if at else None)

    def _find_loaded(self, name: str, version: str | None) -> LoadedCheckpoint | None:
        with self._lock:
            if version is not None:
                return self._loaded.get((name, version))
            key = self._active if self._active and self._active[0] == name else self._plain_names.get(name)
            return self._loaded[key] if key else None

    def _inspect(self, folder: Path) -> tuple[Checkpoint | None, str | None]:
        try:
            checkpoint = self._read_folder(folder)
        except CheckpointError as error:
            return None, self._sentence(error)
        try:
            self._fits(checkpoint)
        except CheckpointError as error:
            return checkpoint, self._sentence(error)
        return checkpoint, None

    def _read_checked(self, folder: Path, param: str | None) -> Checkpoint:
        try:
            checkpoint = self._read_folder(folder)
            self._fits(checkpoint)
        except CheckpointMismatch as error:
            raise WrongModel(self._sentence(error), param=param) from error
        except CheckpointError as error:
            raise UnusableCheckpoint(self._sentence(error), param=param) from error
        return checkpoint

    def _sentence(self, error: CheckpointError) -> str:
        """The error as a sentence for clients, without the server's own paths."""
        text = str(error).replace(f"{self._root}/", "").rstrip(".")
        begins_with_a_path = "/" in text.partition(" ")[0]
        return f"{text}." if begins_with_a_path else f"{text[:1].upper()}{text[1:]}."

    def _read_folder(self, folder: Path) -> Checkpoint:
        """Reads a folder, unless its files are those that were read last; what was wrong with them is remembered, too.
        One that is being written while it is read is read again."""
        until = time.monotonic() + PATIENCE
        while True:
            state = _state(folder)
            known = self._read_cache.get(folder)
            if known is None or known[0] != state:
                known = self._read_cache[folder] = (state, _read_or_reason(folder))
            found = known[1]
            if not isinstance(found, str):
                return found
            if _state(folder) == state or time.monotonic() > until:
                raise CheckpointError(found)
            time.sleep(POLL)


def _state(folder: Path) -> State:
    return tuple(_file_state(folder / name) for name in (folders.CONFIG, folders.TENSORS))


def _file_state(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _read_or_reason(folder: Path) -> Checkpoint | str:
    try:
        return folders.load(folder)
    except CheckpointError as error:
        return str(error)


class CheckpointLease:
    """Keeps the checkpoints of one request in the bank while it has owners: the request's coroutine until `close`, the
    engine from `acquire` until it calls what that has returned. Used from several threads."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._checkpoints: list[LoadedCheckpoint] = []
        self._owners = 0
        self.close = self.acquire()

    def acquire(self) -> Callable[[], None]:
        """One more owner; returns the function that ends its ownership. Calling that again does nothing."""
        once = threading.Lock()
        with self._lock:
            self._owners += 1

        def release() -> None:
            if not once.acquire(blocking=False):
                return
            with self._lock:
                self._owners -= 1
                ended, self._checkpoints = ([], self._checkpoints) if self._owners else (self._checkpoints, [])
            for loaded in ended:
                self._registry.release(loaded)

        return release

    def add(self, reference: str | None) -> LoadedCheckpoint | None:
        """A checkpoint that the request uses; see `Registry.acquire`."""
        loaded = self._registry.acquire(reference)
        if loaded is None:
            return None
        with self._lock:
            if self._owners:
                self._checkpoints.append(loaded)
                return loaded
        self._registry.release(loaded)  # the request has ended meanwhile
        return loaded
