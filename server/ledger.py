"""One order of changes for the checkpoints of many replicas: a `Ledger` keeps it, a `Follower` makes each of them on
its replica. Neither knows how they reach each other (`server/scale.py` does)."""

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from server.errors import CheckpointInUse, EngineDown, NotFound, ServerError, UnusableCheckpoint
from server.registry_state import RegistryState, read_state, write_state

if TYPE_CHECKING:  # without torch: Ray's own processes import this, too
    from server.engine_client import CheckpointInfo
    from server.service import Service

T = TypeVar("T")
log = logging.getLogger(__name__)
POLL_S = 10.0  # how long a question for changes stays open
LOOK_S = 0.25  # how often the ledger looks whether a replica that it waits for is alive
FOLLOW_S = 120.0  # how long all replicas have for a change
RETRY_S = 0.2


class Change(TypedDict):
    """A version that is loaded from now on (and active), or a name's versions that are not."""

    name: str
    version: str | None  # None: all that are loaded, where they are unloaded
    what: str  # "load", "activate" or "unload"
    sha256: str | None  # of what is loaded; None: as its folder is


class Joined(TypedDict):
    ledger: str  # the identity of the ledger: another one after it was restarted
    number: int  # of the last change
    changes: list[Change]  # what makes a new replica the same as the others


class Outcome(TypedDict):
    refused: str | None  # why nothing has changed
    problems: dict[str, str]  # replica -> why it could not follow
    late: list[str]  # replicas that live, and have not made it in `FOLLOW_S`


class LedgerGone(Exception):
    """The ledger is being restarted."""


class LedgerClient(Protocol):
    """A ledger as its replicas see it. Everything raises LedgerGone."""

    async def join(self, replica: str, known: list[Change]) -> Joined: ...

    async def changes_after(
        self, ledger: str, replica: str, number: int, problem: str | None
    ) -> list[tuple[int, Change]] | None: ...

    async def publish(self, change: Change) -> Outcome: ...


def label_of(change: Change) -> str:
    """NAME@VERSION."""
    return f"{change['name']}@{change['version']}"


class Served:
    """What changes have led to: the loaded versions in the order in which names came to mean them, and the active
    one."""

    def __init__(self) -> None:
        self._loaded: dict[str, Change] = {}
        self.active: str | None = None

    def add(self, change: Change) -> None:
        """Raises CheckpointInUse where the active version would be unloaded."""
        if change["what"] == "unload":
            gone = [
                label
                for label, one in self._loaded.items()
                if one["name"] == change["name"] and change["version"] in (None, one["version"])
            ]
            if self.active in gone:
                raise CheckpointInUse(f"Checkpoint {self.active} is active; activate another one first.")
            for label in gone:
                del self._loaded[label]
            return
        label = label_of(change)
        self._loaded.pop(label, None)  # it comes last now
        self._loaded[label] = {**change, "what": "load"}
        if change["what"] == "activate":
            self.active = label

    def changes(self) -> list[Change]:
        """Those that lead here from nothing."""
        return [{**one, "what": "activate"} if label == self.active else {**one} for label, one in self._loaded.items()]

    def state(self, model: str) -> RegistryState:
        """For the file that a restart reads."""
        versions = {one["name"]: str(one["version"]) for one in self._loaded.values()}
        return RegistryState(model, self.active, tuple(sorted(self._loaded)), versions)

    @classmethod
    def of_state(cls, state: RegistryState) -> "Served":
        served = cls()
        meant = [f"{name}@{version}" for name, version in state.versions.items()]
        labels = [*(label for label in state.loaded if label not in meant), *meant]
        for label in [*labels, *([state.active] if state.active else ())]:
            name, _, version = label.partition("@")
            what = "activate" if label == state.active else "load"
            served.add({"name": name, "version": version, "what": what, "sha256": None})
        return served


class Ledger:
    """The order of changes, and how far each replica has come. Everything is called on one event loop.

    The one writer of the state file: what was loaded and active is so again after a restart of all replicas.
    """

    def __init__(
        self, root: Path, model: str, is_alive: Callable[[str], Awaitable[bool]], *, remember: bool, active: bool
    ) -> None:
        """`root`: the folder of checkpoints. `is_alive` tells whether a replica's process runs still. `active`: the
        settings name the checkpoint that is active at the start, whatever was before."""
        self._id = secrets.token_hex(8)
        self._root, self._model, self._remember = root, model, remember
        self._is_alive = is_alive
        self._served = Served.of_state(read_state(root, model)) if remember else Served()
        if active:
            self._served.active = None
        self._number = 0  # of the last change
        self._changes: deque[Change] = deque()  # the last ones, from the first that a replica has yet to make
        self._done: dict[str, int] = {}  # replica -> the last change that it has made
        self._problems: dict[str, str] = {}  # of replicas that have to be replaced, for those that wait for a change
        self._waiting = 0  # how many do
        self._news = asyncio.Condition()

    async def join(self, replica: str, known: list[Change]) -> Joined:
        """A replica begins. What it has is taken over where nothing is known yet, and its active one where none is."""
        empty = not self._served.changes()
        for change in known:
            if empty or (change["what"] == "activate" and self._served.active is None):
                self._served.add(change)
        self._done[replica] = self._number
        return {"ledger": self._id, "number": self._number, "changes": self._served.changes()}

    async def changes_after(
        self, ledger: str, replica: str, number: int, problem: str | None
    ) -> list[tuple[int, Change]] | None:
        """The changes after `number`, which the replica has made, or could not (`problem`); waits for them, at most
        `POLL_S` seconds. None: it has to join (again), as after a problem."""
        if ledger != self._id or replica not in self._done:
            return None
        async with self._news:
            self._done[replica] = number
            self._news.notify_all()
            if problem is not None:
                if self._waiting:
                    self._problems[replica] = problem
                self._leave(replica)
                return None
            self._forget()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._news.wait_for(lambda: self._number > number)
        before = self._number - len(self._changes)
        if number < before:  # it was taken for dead
            return None
        return [(after, self._changes[after - before - 1]) for after in range(number + 1, self._number + 1)]

    async def publish(self, change: Change) -> Outcome:
        """Returns when every replica that is alive has made the change, or said why not."""
        async with self._news:
            try:
                self._served.add(change)
            except CheckpointInUse as error:
                return {"refused": error.message, "problems": {}, "late": []}
            self._changes.append(change)
            number = self._number = self._number + 1
            if self._remember:
                write_state(self._root, self._served.state(self._model))
            self._news.notify_all()
        asked = list(self._done)
        self._waiting += 1
        try:
            late = await self._until_made(asked, number)
            problems = {replica: self._problems.pop(replica) for replica in asked if replica in self._problems}
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._problems.clear()
        return {"refused": None, "problems": problems, "late": late}

    async def _until_made(self, replicas: list[str], number: int) -> list[str]:
        """Those that are late, and live."""
        loop = asyncio.get_running_loop()
        end = loop.time() + FOLLOW_S
        while waiting := [replica for replica in replicas if self._done.get(replica, number) < number]:
            if loop.time() > end:
                break
            await self._wait_for(waiting, number)
        return waiting

    def _leave(self, replica: str) -> None:
        self._done.pop(replica, None)
        self._forget()

    def _forget(self) -> None:
        """The changes that every replica has made."""
        made = min(self._done.values(), default=self._number)
        while self._number - len(self._changes) < made:
            self._changes.popleft()

    async def _wait_for(self, replicas: list[str], number: int) -> None:
        """Until something is new of them; those that have died are forgotten."""
        async with self._news:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._news.wait_for(lambda: any(self._done.get(one, number) >= number for one in replicas))
                    return
        for replica in replicas:
            if not await self._is_alive(replica):
                log.warning("replica %s has gone", replica)
                self._leave(replica)


class Follower:
    """Makes every change of the ledger on this replica's service. Its `reload` and `unload` change all replicas."""

    def __init__(self, service: "Service", ledger: LedgerClient, replica: str) -> None:
        self.trouble: str | None = None  # why this replica differs from the others; it has to be replaced
        self._service = service
        self._ledger = ledger
        self._replica = replica
        self._known = Served()
        self._changing: set[asyncio.Task[Any]] = set()
        self._joined = ""
        self._number = 0

    async def join(self, active: str | None) -> None:
        """Become what the others are, before the first request. `active`: NAME@VERSION that this replica has activated
        by its settings. Raises ServerError where what is active cannot be loaded here."""
        if active is not None:
            name, _, version = active.partition("@")
            self._known.add({"name": name, "version": version, "what": "activate", "sha256": None})
        while True:
            try:
                return await self._join()
            except LedgerGone:
                await asyncio.sleep(RETRY_S)

    async def _join(self) -> None:
        joined = await self._ledger.join(self._replica, self._known.changes())
        self._known = Served()
        for change in joined["changes"]:
            try:
                await self._make(change)
            except ServerError as error:
                if change["what"] == "activate":
                    raise
                log.warning("checkpoint %s is loaded elsewhere, and cannot be here: %s", label_of(change), error)
        self._joined, self._number = joined["ledger"], joined["number"]

    async def follow(self) -> None:
        """For ever, until it is cancelled, or this replica differs from the others (`trouble`)."""
        while True:
            try:
                news = await self._ledger.changes_after(self._joined, self._replica, self._number, self.trouble)
                if self.trouble is not None:
                    return
                if news is None:
                    await self._join()
                for number, change in news or ():
                    self._number = number
                    await self._make(change)
            except LedgerGone:
                await asyncio.sleep(RETRY_S)
            except ServerError as error:
                self.trouble = error.message
                log.error("this replica cannot follow the others: %s", error.message)

    async def _make(self, change: Change) -> None:
        """Raises ServerError."""
        name, version = change["name"], change["version"]
        if change["what"] == "unload":
            with contextlib.suppress(NotFound, CheckpointInUse):  # it is not there, or this replica is ahead
                await self._service.unload(name, version)
        else:
            loaded = await self._service.reload(name, version, activate=change["what"] == "activate")
            if change["sha256"] not in (None, loaded.sha256):
                raise UnusableCheckpoint(f"The folder of {loaded.label} holds another content here than elsewhere.")
        self._known.add(change)

    async def reload(self, name: str, version: str | None, *, activate: bool = False) -> "CheckpointInfo":
        """See `Registry.reload`: on this replica, which finds the newest version where none is given, then on all."""
        return await self._to_the_end(self._reload(name, version, activate))

    async def _reload(self, name: str, version: str | None, activate: bool) -> "CheckpointInfo":
        loaded = await self._service.reload(name, version, activate=activate)
        what = "activate" if activate else "load"
        await self._publish({"name": name, "version": loaded.version, "what": what, "sha256": loaded.sha256})
        return loaded

    async def unload(self, name: str, version: str | None) -> list[str]:
        """See `Registry.unload`: on all replicas; returns what was loaded on this one."""
        return await self._to_the_end(self._unload(name, version))

    async def _to_the_end(self, change: Coroutine[Any, Any, T]) -> T:
        """Also where whoever asked for it has gone: a change of this replica alone would set it apart."""
        task = asyncio.create_task(change)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        return await asyncio.shield(task)

    async def _unload(self, name: str, version: str | None) -> list[str]:
        unloaded = await self._service.unload(name, version)
        await self._publish({"name": name, "version": version, "what": "unload", "sha256": None})
        return unloaded

    async def _publish(self, change: Change) -> None:
        try:
            outcome = await self._ledger.publish(change)
        except LedgerGone:
            raise EngineDown(
                "The replicas cannot agree on the change now, and not all may have made it: try again."
            ) from None
        if outcome["refused"]:
            raise CheckpointInUse(outcome["refused"])
        for replica, why in outcome["problems"].items():
            raise UnusableCheckpoint(
                f"{len(outcome['problems'])} of the replicas could not follow, and are replaced: {replica}: {why}"
            )
        for replica in outcome["late"]:
            raise EngineDown(
                f"{len(outcome['late'])} of the replicas have not made the change in {FOLLOW_S:g} s; they make it when "
                f"they go on, or are replaced: {replica}"
            )
