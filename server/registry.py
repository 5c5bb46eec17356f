"""Checkpoints: which there are, which are loaded into the bank, which one is active, who uses them."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.engine.sequence import PositionsName
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
from server.remembered import Served
from steering import checkpoint as folders
from steering.checkpoint import Checkpoint, base_model_info, verify_against, verify_sites
from steering.columns import ColumnBank, Handle
from steering.errors import CheckpointError, CheckpointMismatch, NotFound, UnsupportedArchitecture

log = logging.getLogger(__name__)
PREFERRED = "demo"
Key = tuple[str, str]  # name, version
State = tuple[tuple[int, int], ...]  # of a folder: when each of its files was written (ns), and its size (bytes)
OnEngine = Callable[[Callable[[], Any]], "Future[Any]"]


@dataclass(frozen=True, eq=False)
class Loaded:
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
    def defaults(self) -> dict[str, float]:
        """Attribute -> default multiplier."""
        return self.checkpoint.attributes

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


@dataclass(frozen=True)
class Entry:
    """One complete checkpoint folder."""

    name: str
    version: str
    checkpoint: Checkpoint | None  # what is served, where it is loaded; None: damaged
    problem: str | None  # why what is in the folder cannot be loaded on this model
    loaded: bool
    changed: bool  # loaded, and the folder holds another one by now
    active: bool


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


class Registry:
    """Used from several threads; what changes the bank runs on the engine's thread.

    A plain name means the active version of that name, else the version that was the newest when the plain name was
    first asked for. Neither a folder that appears under a running server nor a request for another version changes it;
    `renew` and `activate` do. What is replaced or unloaded serves the requests that hold it to their end.
    """

    def __init__(
        self,
        root: Path,
        bank: ColumnBank,
        fits: Callable[[Checkpoint], None],
        on_engine: OnEngine,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when somebody has loaded, activated or unloaded a checkpoint for good."""
        self.on_change = on_change
        self._root = root
        self._bank = bank
        self._fits = fits
        self._on_engine = on_engine
        self._lock = threading.Lock()  # guards the four below
        self._loaded: dict[Key, Loaded] = {}
        self._meant: dict[str, Key] = {}  # what a plain name stands for
        self._pins: dict[Loaded, int] = {}
        self._active: Key | None = None
        self._loading = threading.Lock()  # one load at a time
        self._read: dict[Path, tuple[State, Checkpoint]] = {}

    @property
    def active(self) -> Loaded | None:
        with self._lock:
            return self._loaded[self._active] if self._active else None

    @property
    def loaded(self) -> list[Loaded]:
        """By name and version."""
        with self._lock:
            return [self._loaded[key] for key in sorted(self._loaded)]

    @property
    def pins(self) -> int:
        """Uses of loaded checkpoints by requests that have not ended."""
        with self._lock:
            return sum(self._pins.values())

    def activate(self, reference: str) -> Loaded:
        """Make NAME or NAME@VERSION the one that requests get when they name none."""
        return self._activate(self.load(reference))

    def renew(self, name: str, version: str | None = None, *, activate: bool = False) -> Loaded:
        """EngineStatus a version, or the newest, as its folder is now; the plain name means it from now on.

        What was loaded of it before, and is another one, is replaced between two steps. A folder that cannot be used
        changes nothing. Raises UnknownCheckpoint, UnusableCheckpoint, WrongModel.
        """
        with self._loading:
            folder = self._folder(name, version, "name" if version is None else "version")
            checkpoint, key = self._usable(folder, None), (name, folder.name)
            with self._lock:
                old = self._loaded.get(key)
            new = old if old and old.checkpoint.config == checkpoint.config else self._into_bank(folder, None)
            with self._lock:
                self._loaded[key], self._meant[name] = new, key
        if old is not None and old is not new:
            self._retire(old)
        if activate:
            self._activate(new)
        self.on_change()
        return new

    def unload(self, name: str, version: str | None = None) -> list[str]:
        """Take a version, or all versions of a name, out; says which there were.

        Raises UnknownCheckpoint, CheckpointInUse for the active one.
        """
        with self._lock:
            gone = [key for key in self._loaded if key[0] == name and version in (None, key[1])]
            if self._active in gone:
                raise CheckpointInUse(f"Checkpoint {'@'.join(self._active)} is active; activate another one first.")
            retired = [self._loaded.pop(key) for key in gone]
            if self._meant.get(name) in gone:
                del self._meant[name]
        if not gone:
            self._folder(name, version, "name" if version is None else "version")
        for one in retired:
            self._retire(one)
        self.on_change()
        return [one.label for one in retired]

    def _activate(self, loaded: Loaded) -> Loaded:
        with self._lock:
            self._active = (loaded.name, loaded.version)
        return loaded

    def served(self, model: str) -> Served:
        """What is loaded and active now."""
        with self._lock:
            active = "@".join(self._active) if self._active else None
            return Served(model, active, tuple(map("@".join, sorted(self._loaded))), dict(self._meant.values()))

    def restore(self, served: Served) -> Loaded | None:
        """EngineStatus what was loaded, as far as it is still there; returns what was active."""
        for label in served.loaded:
            try:
                loaded = self.load(label)
            except ServerError as error:
                log.warning("checkpoint %s was loaded before, and cannot be now: %s", label, error.message)
                continue
            if served.meant.get(loaded.name) == loaded.version:
                with self._lock:
                    self._meant[loaded.name] = loaded.name, loaded.version
        try:
            return self.activate(served.active) if served.active else None
        except ServerError as error:
            log.warning("checkpoint %s was active before, and cannot be now: %s", served.active, error.message)
            return None

    def activate_default(self) -> Loaded | None:
        """The only loadable checkpoint, or the one called "demo"; None when there is no such."""
        names = {entry.name for entry in self.entries() if not entry.problem}
        if PREFERRED in names:
            return self.activate(PREFERRED)
        return self.activate(names.pop()) if len(names) == 1 else None

    def load(self, reference: str, param: str | None = None) -> Loaded:
        """The checkpoint NAME or NAME@VERSION, read and put into the bank if it is not there yet. Blocks.

        Raises UnknownCheckpoint, UnusableCheckpoint, WrongModel.
        """
        name, at, text = reference.partition("@")
        version = text if at else None
        if found := self._find_loaded(name, version):
            return found
        with self._loading:
            if found := self._find_loaded(name, version):  # loaded while this call waited
                return found
            folder = self._folder(name, version, param)
            loaded = self._find_loaded(name, folder.name) or self._into_bank(folder, param)
            with self._lock:
                self._loaded[name, loaded.version] = loaded
                if version is None:
                    self._meant[name] = name, loaded.version
            return loaded

    def _into_bank(self, folder: Path, param: str | None) -> Loaded:
        checkpoint = self._usable(folder, param)
        handle = self._on_engine(lambda: self._bank.add(checkpoint.columns)).result()
        loaded = Loaded(folder.parent.name, folder.name, checkpoint, handle)
        log.info("loaded checkpoint %s (%d columns)", loaded.label, len(checkpoint.columns))
        return loaded

    def _folder(self, name: str, version: str | None, param: str | None) -> Path:
        try:
            return folders.find(self._root, name, version)
        except NotFound:
            reference = name if version is None else f"{name}@{version}"
            versions = [other for one, other, _ in folders.list_checkpoints(self._root) if one == name]
            known = f" Of {name!r} there are {', '.join(versions)}." if versions else self._known_names()
            raise UnknownCheckpoint(f"There is no checkpoint {reference!r}.{known}", param=param) from None

    def _known_names(self) -> str:
        names = dict.fromkeys(name for name, _, _ in folders.list_checkpoints(self._root))
        return f" There are {', '.join(names)}." if names else ""

    def hold(self, reference: str | None, param: str | None = None) -> Loaded | None:
        """What a request uses (None: the active one, if there is one): it stays until `release`. Blocks as `load`."""
        while True:
            loaded = self.active if reference is None else self.load(reference, param)
            if loaded is None:
                return None
            with self._lock:
                # Else it has been replaced or unloaded since.
                if self._loaded.get((loaded.name, loaded.version)) is loaded:
                    self._pins[loaded] = self._pins.get(loaded, 0) + 1
                    return loaded

    def release(self, loaded: Loaded) -> None:
        """A request has ended."""
        with self._lock:
            self._pins[loaded] -= 1
            if self._pins[loaded]:
                return
            del self._pins[loaded]
            stays = self._loaded.get((loaded.name, loaded.version)) is loaded
        if not stays:
            self._out_of_bank(loaded)

    def _retire(self, loaded: Loaded) -> None:
        """It is not in `_loaded` any more: takes it out of the bank, now or when its last request ends."""
        with self._lock:
            used = loaded in self._pins
        if not used:
            self._out_of_bank(loaded)

    def _out_of_bank(self, loaded: Loaded) -> None:
        try:
            self._on_engine(lambda: self._bank.remove(loaded.handle))
        except EngineDown:  # and the bank with it
            return
        log.info("unloaded checkpoint %s", loaded.label)

    def entries(self, name: str | None = None) -> list[Entry]:
        """Every complete folder, or those of one name. Reads what has changed since the last look."""
        with self._lock:
            loaded, active = dict(self._loaded), self._active
        entries = []
        for found, version, folder in folders.list_checkpoints(self._root):
            if name is not None and found != name:
                continue
            checkpoint, problem = self._look(folder)
            key = found, version
            changed = False
            if served := loaded.get(key):
                changed = checkpoint is None or checkpoint.config != served.checkpoint.config
                checkpoint = served.checkpoint
            entries.append(Entry(found, version, checkpoint, problem, served is not None, changed, key == active))
        return entries

    def known_as(self, reference: str) -> Loaded | None:
        """What NAME or NAME@VERSION means now, if that is loaded."""
        name, at, version = reference.partition("@")
        return self._find_loaded(name, version if at else None)

    def _find_loaded(self, name: str, version: str | None) -> Loaded | None:
        with self._lock:
            if version is not None:
                return self._loaded.get((name, version))
            key = self._active if self._active and self._active[0] == name else self._meant.get(name)
            return self._loaded[key] if key else None

    def _look(self, folder: Path) -> tuple[Checkpoint | None, str | None]:
        try:
            checkpoint = self._load_folder(folder)
        except CheckpointError as error:
            return None, self._sentence(error)
        try:
            self._fits(checkpoint)
        except CheckpointError as error:
            return checkpoint, self._sentence(error)
        return checkpoint, None

    def _usable(self, folder: Path, param: str | None) -> Checkpoint:
        try:
            checkpoint = self._load_folder(folder)
            self._fits(checkpoint)
        except CheckpointMismatch as error:
            raise WrongModel(self._sentence(error), param=param) from error
        except CheckpointError as error:
            raise UnusableCheckpoint(self._sentence(error), param=param) from error
        return checkpoint

    def _sentence(self, error: CheckpointError) -> str:
        """For clients, whom the server's folders do not concern."""
        text = str(error).replace(f"{self._root}/", "").rstrip(".")
        begins_with_a_path = "/" in text.partition(" ")[0]
        return f"{text}." if begins_with_a_path else f"{text[:1].upper()}{text[1:]}."

    def _load_folder(self, folder: Path) -> Checkpoint:
        """Reads a folder again when one of its files has changed, or the last try has failed."""
        try:
            found = [(folder / name).stat() for name in (folders.CONFIG, folders.TENSORS)]
        except OSError:
            return folders.load(folder)  # which says what is not there
        state = tuple((stat.st_mtime_ns, stat.st_size) for stat in found)
        known = self._read.get(folder)
        if known is None or known[0] != state:
            known = self._read[folder] = (state, folders.load(folder))
        return known[1]


class Holding:
    """The checkpoints that one request uses, until everybody who has a claim has let go: threads may differ."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._held: list[Loaded] = []
        self._claims = 0
        self.close = self.claim()

    def claim(self) -> Callable[[], None]:
        """Keeps what is held until the returned function is called, which may be called again for nothing."""
        once = threading.Lock()
        with self._lock:
            self._claims += 1

        def let_go() -> None:
            if not once.acquire(blocking=False):
                return
            with self._lock:
                self._claims -= 1
                held, self._held = ([], self._held) if self._claims else (self._held, [])
            for loaded in held:
                self._registry.release(loaded)

        return let_go

    def take(self, reference: str | None, param: str | None = None) -> Loaded | None:
        """See `Registry.hold`."""
        loaded = self._registry.hold(reference, param)
        if loaded is None:
            return None
        with self._lock:
            if self._claims:
                self._held.append(loaded)
                return loaded
        self._registry.release(loaded)  # the request has gone meanwhile
        return loaded
