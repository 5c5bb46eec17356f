"""Replicas of a server have the same checkpoints, in whatever order changes, restarts and deaths come."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server import ledger as module
from server.api.routes import readyz
from server.app import create_app
from server.config import Settings
from server.errors import CheckpointInUse, EngineDown, UnusableCheckpoint
from server.ledger import Change, Follower, Joined, Ledger, LedgerGone, Outcome
from server.registry_state import NAME
from server.service import Service

DEAD = "dead"
Services = Callable[..., Service]
Story = Callable[[], Coroutine[Any, Any, None]]


class Line:
    """The ledger as replicas reach it; it may be down, or another one."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger: Ledger | None = ledger
        self.free = asyncio.Event()  # cleared: changes wait to be published
        self.free.set()

    def _up(self) -> Ledger:
        if self.ledger is None:
            raise LedgerGone
        return self.ledger

    async def join(self, replica: str, known: list[Change]) -> Joined:
        return await self._up().join(replica, known)

    async def changes_after(self, *asked: Any) -> list[tuple[int, Change]] | None:
        return await self._up().changes_after(*asked)

    async def publish(self, change: Change) -> Outcome:
        await self.free.wait()
        return await self._up().publish(change)


async def is_alive(replica: str) -> bool:
    return replica != DEAD


@pytest.fixture
def root(checkpoints: Path, tmp_path: Path) -> Path:
    for name in ("demo", "other"):
        shutil.copytree(checkpoints / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def services(settings: Settings, root: Path) -> Iterator[Services]:
    """Makes services of the same settings, or of others."""
    made: list[FastAPI] = []

    def make(**other: Any) -> Service:
        made.append(create_app(settings.model_copy(update={"checkpoints": root, **other})))
        service: Service = made[-1].state.service
        return service

    async def stop(app: FastAPI) -> None:
        async with app.router.lifespan_context(app):
            pass

    yield make
    for one in made:
        asyncio.run(stop(one))


def ledger_of(root: Path, **given: Any) -> Ledger:
    return Ledger(root, "tiny", is_alive, **{"remember": False, "active": False, **given})


@asynccontextmanager
async def following(line: Line, *services: Service) -> AsyncIterator[list[Follower]]:
    followers = [Follower(service, line, f"replica-{index}") for index, service in enumerate(services)]
    for one, service in zip(followers, services, strict=True):
        await one.join(await active(service))
    tasks = [asyncio.create_task(one.follow()) for one in followers]
    try:
        yield followers
    finally:
        for task in tasks:
            task.cancel()


async def active(service: Service) -> str | None:
    return (await readyz(service)).checkpoint


async def loaded(service: Service) -> set[str]:
    return {f"{one.name}@{one.version}" for one in await service.checkpoints() if one.loaded}


def run(story: Story) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await story()

    asyncio.run(bounded())


def test_a_change_has_been_made_everywhere_when_it_returns(services: Services, root: Path) -> None:
    first, second = services(), services()

    async def story() -> None:
        async with following(Line(ledger_of(root)), first, second) as (one, other):
            answer = await one.reload("demo", "1", activate=True)
            assert (answer.version, await active(second)) == ("1", "demo@1")
            await other.reload("other", None)
            assert await loaded(first) == await loaded(second) == {"demo@1", "demo@2", "other@1"}
            assert await one.unload("other", None) == ["other@1"]
            assert await loaded(second) == {"demo@1", "demo@2"}
            with pytest.raises(CheckpointInUse):
                await other.unload("demo", "1")

    run(story)


def test_a_new_replica_begins_with_what_the_others_have(services: Services, root: Path) -> None:
    first, second = services(), services()

    async def story() -> None:
        line = Line(ledger_of(root))
        async with following(line, first) as (one,):
            await one.reload("other", "1")
            await one.reload("demo", "1", activate=True)
            assert await active(second) == "demo@2", "by itself it takes the newest"
            newcomer = Follower(second, line, "new")
            await newcomer.join("demo@2")
            assert await active(second) == "demo@1"
            assert await loaded(second) == {"demo@1", "demo@2", "other@1"}

    run(story)


def test_changes_from_two_replicas_at_once_end_in_one_order(services: Services, root: Path) -> None:
    first, second = services(), services()

    async def story() -> None:
        async with following(Line(ledger_of(root)), first, second) as (one, other):
            for _ in range(5):
                await asyncio.gather(
                    *(one.reload("demo", "1", activate=True), other.reload("demo", "2", activate=True))
                )
                assert await active(first) == await active(second)

    run(story)


def test_a_change_reaches_all_though_the_client_that_asked_has_gone(services: Services, root: Path) -> None:
    first, second = services(), services()

    async def story() -> None:
        line = Line(ledger_of(root))
        async with following(line, first, second) as (one, _):
            line.free.clear()
            asked = asyncio.create_task(one.reload("demo", "1", activate=True))
            while await active(first) != "demo@1":
                await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            line.free.set()
            while await active(second) != "demo@1":
                await asyncio.sleep(0.01)

    run(story)


def test_nobody_waits_for_a_replica_that_has_died(services: Services, root: Path) -> None:
    first = services()

    async def story() -> None:
        line = Line(ledger_of(root))
        await line.join(DEAD, [])
        async with following(line, first) as (one,), asyncio.timeout(5):
            assert (await one.reload("demo", "1", activate=True)).version == "1"

    run(story)


def test_a_replica_that_stands_still_too_long_is_named(
    services: Services, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOW_S", 0.3)
    first = services()

    async def story() -> None:
        line = Line(ledger_of(root))
        await line.join("slow", [])
        async with following(line, first) as (one,):
            with pytest.raises(EngineDown, match=r"1 of the replicas have not made the change .* slow"):
                await one.reload("demo", "1", activate=True)

    run(story)


def change(version: str) -> Change:
    return {"name": "demo", "version": version, "what": "load", "sha256": None}


def test_a_change_is_kept_until_all_have_made_it_and_a_problem_until_it_is_told(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOW_S", 0.05)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "POLL_S", 0.01)
    ledger = ledger_of(root)

    async def story() -> None:
        identity = (await ledger.join("slow", []))["ledger"]
        await ledger.join("quick", [])
        for number, version in enumerate("123"):
            assert (await ledger.publish(change(version)))["late"] == ["slow", "quick"]
            assert await ledger.changes_after(identity, "quick", number, None) == [(number + 1, change(version))]
        assert await ledger.changes_after(identity, "quick", 3, None) == []
        missed = [(1, change("1")), (2, change("2")), (3, change("3"))]
        assert await ledger.changes_after(identity, "slow", 0, None) == missed
        assert await ledger.changes_after(identity, "slow", 2, None) == missed[2:]
        assert len(ledger._changes) == 1
        assert await ledger.changes_after(identity, "slow", 2, "it has no such folder") is None
        assert not ledger._changes
        assert not ledger._problems, "nobody waits for what it says"
        await ledger.join(DEAD, [])
        await ledger.publish(change("4"))
        assert len(ledger._changes) == 1
        assert await ledger.changes_after(identity, "quick", 4, None) == []
        assert not ledger._changes, "who has died is not waited for"
        await ledger.join("slow", [])
        ledger._done["quick"] = 2  # as if it had stood still for longer than it was known
        assert await ledger.changes_after(identity, "quick", 2, None) is None

    run(story)


def test_many_changes_leave_nothing_behind(services: Services, root: Path) -> None:
    first, second = services(), services()

    async def story() -> None:
        line = Line(ledger_of(root))
        async with following(line, first, second) as (one, other):
            for _ in range(5):
                await one.reload("demo", "1", activate=True)
                await other.reload("demo", "2", activate=True)
            assert line.ledger is not None
            assert not line.ledger._changes
            assert await active(first) == await active(second) == "demo@2"

    run(story)


@pytest.mark.parametrize("difference", ["no folder", "another content"])
def test_a_replica_that_cannot_follow_is_named_and_is_to_be_replaced(
    services: Services, root: Path, checkpoints: Path, tmp_path: Path, difference: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(checkpoints / "demo/2", elsewhere / "demo/2")
    if difference == "another content":
        shutil.copytree(checkpoints / "demo/2", elsewhere / "demo/1")
    first, second = services(), services(checkpoints=elsewhere)

    async def story() -> None:
        async with following(Line(ledger_of(root)), first, second) as (one, other):
            with pytest.raises(UnusableCheckpoint, match="replica-1"):
                await one.reload("demo", "1", activate=True)
            assert other.trouble
            assert not one.trouble
            assert (await one.reload("demo", "2", activate=True)).version == "2", "nobody waits for it any more"

    run(story)


def test_a_replica_without_the_active_checkpoint_does_not_begin(services: Services, root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(root / "other", elsewhere / "other")
    first, second = services(), services(checkpoints=elsewhere)

    async def story() -> None:
        line = Line(ledger_of(root))
        async with following(line, first):
            with pytest.raises(module.ServerError, match="demo@2"):
                await Follower(second, line, "new").join(None)

    run(story)


def test_another_ledger_learns_from_the_replicas_what_they_have(
    services: Services, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.1)
    first, second = services(), services()

    async def story() -> None:
        line = Line(ledger_of(root))
        async with following(line, first, second) as (one, other):
            await one.reload("other", None)
            await one.reload("demo", "1", activate=True)
            line.ledger = None
            with pytest.raises(EngineDown, match="try again"):
                await other.reload("demo", "2", activate=True)
            line.ledger = ledger_of(root)
            async with asyncio.timeout(15):
                while await active(second) != "demo@1":  # what was not agreed on is taken back
                    await asyncio.sleep(0.05)
            await other.reload("demo", "2", activate=True)
            assert await active(first) == "demo@2"
            newcomer = services()
            await Follower(newcomer, line, "new").join("demo@2")
            assert await loaded(newcomer) == {"demo@1", "demo@2", "other@1"}

    run(story)


def test_what_was_loaded_and_active_is_so_again_after_all_have_ended(services: Services, root: Path) -> None:
    first, second = services(), services()

    async def story() -> None:
        async with following(Line(ledger_of(root, remember=True)), first) as (one,):
            await one.reload("other", None)
            await one.reload("demo", "1", activate=True)
        assert json.loads((root / NAME).read_text())["active"] == "demo@1"
        await Follower(second, Line(ledger_of(root, remember=True)), "later").join("demo@2")
        assert (await active(second), await loaded(second)) == ("demo@1", {"demo@1", "demo@2", "other@1"})
        third = services()
        await Follower(third, Line(ledger_of(root, remember=True, active=True)), "named").join("demo@2")
        assert await active(third) == "demo@2", "the settings name it"

    run(story)
