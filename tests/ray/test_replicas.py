"""Replicas on a Ray cluster of this machine: changes reach all of them, and what one loses is its own.

`make test-ray` runs them in an environment of their own; they are skipped where Ray is not installed.
"""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.processes import ray_processes, ready_replicas, running
from steering.checkpoint import load, save

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
BODY = {"prompt": "Q: What is the capital of Japan? A:", "temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
STARTED_S = 300.0


@dataclass(frozen=True)
class Fleet:
    url: str
    pid: int  # of `matsteer serve --ray`
    size: int
    expected: dict[str, str]  # NAME@VERSION -> the text that it makes of BODY

    def change(self, method: str, path: str, **body: Any) -> Any:
        response = httpx.request(method, f"{self.url}{path}", json=body or None, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    def asks_all(self, count: int = 12) -> set[str]:
        """The versions that requests get, of which some go to each replica."""

        async def ask() -> set[str]:
            async with httpx.AsyncClient(timeout=60) as client:
                answers = await asyncio.gather(*(client.post(f"{self.url}/generate", json=BODY) for _ in range(count)))
                return {self.version(answer) for answer in answers}

        return asyncio.run(ask())

    def version(self, answer: httpx.Response) -> str:
        """NAME@VERSION that an answer names, which has to be what its text comes from."""
        assert answer.status_code == 200, answer.text
        result = answer.json()["results"][0]
        label = f"{result['steering']['checkpoint']}@{result['steering']['version']}"
        assert result["text"] == self.expected[label]
        return label

    def until_whole(self) -> None:
        """Waits for as many replicas as there were at the start, all ready."""
        until(lambda: len(ready_replicas()) == self.size)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STARTED_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo@v1 as it is shipped, and demo@v2, whose vectors point the other way."""
    root = tmp_path_factory.mktemp("ray")
    first = root / "demo/v1"
    shutil.copytree(ROOT / "checkpoints/demo/v1", first)
    found = load(first)
    save(
        root / "demo/v2",
        name="demo",
        version="v2",
        method=found.config.method,
        base_model=found.config.base_model,
        columns=[replace(column, vector=-column.vector) for column in found.columns],
        normalize=found.config.normalize,
        positions=found.config.positions,
        training={},
        evaluation={},
        card="# demo\n",
    )
    return root


@pytest.fixture(scope="module", params=[2, 3])
def fleet(folder: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    (folder / ".served.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "server.cli", "serve", "--ray", "--replicas", str(request.param)]
    environment = {"MATSTEER_REPLICA_CPUS": "0.5"}  # three of them fit on two cores
    with running([*command, "--checkpoints", str(folder), "--log-level", "warning"], environment=environment) as server:
        url, texts = server.url, {}
        for label in ("demo@v1", "demo@v2"):
            answer = httpx.post(f"{url}/generate", json={**BODY, "checkpoint": label}, timeout=60)
            assert answer.status_code == 200, answer.text
            texts[label] = answer.json()["results"][0]["text"]
        assert len(set(texts.values())) == 2
        found = Fleet(url, server.pid, request.param, texts)
        found.until_whole()
        yield found


def test_a_swap_under_load_reaches_every_replica_and_loses_no_request(fleet: Fleet) -> None:
    async def story() -> list[str]:
        over = asyncio.Event()

        async def client() -> list[str]:
            labels = []
            async with httpx.AsyncClient(timeout=60) as http:
                while not over.is_set():
                    labels.append(fleet.version(await http.post(f"{fleet.url}/generate", json=BODY)))
            return labels

        clients = [asyncio.create_task(client()) for _ in range(4 * fleet.size)]
        async with httpx.AsyncClient(timeout=60) as http:
            for version in ("v1", "v2", "v1", "v2", "v1", "v2"):
                changed = await http.post(f"{fleet.url}/checkpoints/demo/activate", json={"version": version})
                assert changed.status_code == 200, changed.text
                answers = await asyncio.gather(
                    *(http.post(f"{fleet.url}/generate", json=BODY) for _ in range(6 * fleet.size))
                )
                assert {fleet.version(answer) for answer in answers} == {f"demo@{version}"}
        over.set()
        return [label for labels in await asyncio.gather(*clients) for label in labels]

    labels = asyncio.run(story())
    print(f"{len(labels)} answers of {fleet.size} replicas beside 6 swaps: {labels.count('demo@v1')} of v1")
    assert set(labels) == {"demo@v1", "demo@v2"}


def test_loading_and_unloading_reach_every_replica(fleet: Fleet) -> None:
    def loaded() -> set[tuple[str, ...]]:
        found = set()
        for _ in range(8 * fleet.size):
            listed = httpx.get(f"{fleet.url}/checkpoints", timeout=60).json()["checkpoints"]
            found.add(tuple(f"{one['name']}@{one['version']}" for one in listed if one["loaded"]))
        return found

    fleet.change("POST", "/checkpoints/demo/activate", version="v2")
    fleet.change("POST", "/checkpoints/demo/load", version="v1")
    assert loaded() == {("demo@v1", "demo@v2")}
    fleet.change("DELETE", "/checkpoints/demo?version=v1")
    assert loaded() == {("demo@v2",)}
    assert httpx.delete(f"{fleet.url}/checkpoints/demo?version=v2", timeout=60).status_code == 409


def test_a_killed_replica_costs_its_running_requests_which_hear_of_it_within_a_second(fleet: Fleet) -> None:
    fleet.change("POST", "/checkpoints/demo/activate", version="v1")  # not the newest, which a bare start would take
    body = {**BODY, "max_new_tokens": 480, "stream": True}

    async def ask() -> tuple[bool, float]:
        async with httpx.AsyncClient(timeout=STARTED_S) as http:
            answer = await http.post(f"{fleet.url}/generate", json={**body, "stream": False})
            assert answer.status_code in (200, 500), answer.text
            return answer.status_code == 200, time.monotonic()

    async def stream(begun: asyncio.Event) -> tuple[bool, float]:
        """Whether it came to its end, and when that was."""
        text = ""
        async with httpx.AsyncClient(timeout=STARTED_S) as http:
            try:
                async with http.stream("POST", f"{fleet.url}/generate", json=body) as answer:
                    async for part in answer.aiter_text():
                        text += part
                        begun.set()
                    return answer.status_code == 200 and "event: done" in text, time.monotonic()
            except httpx.HTTPError:
                return False, time.monotonic()

    async def story() -> tuple[list[tuple[bool, float]], float, list[httpx.Response]]:
        begun = [asyncio.Event() for _ in range(4 * fleet.size)]
        streams = [asyncio.create_task(ask()) for _ in range(2 * fleet.size)]
        streams += [asyncio.create_task(stream(one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        assert not any(one.done() for one in streams)
        os.kill(next(iter(ready_replicas())), signal.SIGKILL)
        killed = time.monotonic()
        async with httpx.AsyncClient(timeout=60) as http:
            after = [await http.post(f"{fleet.url}/generate", json=BODY) for _ in range(8)]
        return await asyncio.gather(*streams), killed, after

    before = ready_replicas()
    ended, killed, after = asyncio.run(story())
    lost = [at - killed for whole, at in ended if not whole]
    print(
        f"{len(lost)} of {len(ended)} requests lost with a replica, the last heard after {max(lost, default=0):.2f} s"
    )
    assert 0 < len(lost) < len(ended)
    assert max(lost) < 1
    assert {fleet.version(answer) for answer in after} == {"demo@v1"}, "requests that come after it find the others"
    until(lambda: len(ready_replicas() - before) == 1)
    assert fleet.asks_all(8 * fleet.size) == {"demo@v1"}, "the new one has what the others have"
    fleet.change("POST", "/checkpoints/demo/activate", version="v2")
    assert fleet.asks_all(8 * fleet.size) == {"demo@v2"}


def test_the_texts_of_a_client_that_leaves_end(fleet: Fleet) -> None:
    async def leave() -> None:
        body = {**BODY, "max_new_tokens": 480, "stream": True}
        async with (
            httpx.AsyncClient(timeout=60) as http,
            http.stream("POST", f"{fleet.url}/generate", json=body) as answer,
        ):
            await anext(answer.aiter_text())

    def idle() -> bool:
        pages = [httpx.get(f"{fleet.url}/metrics", timeout=60).text for _ in range(6 * fleet.size)]
        return all("\nmatsteer_num_requests_running 0.0" in page for page in pages)

    for _ in range(2 * fleet.size):
        asyncio.run(leave())
    left = time.monotonic()
    until(idle)
    print(f"all texts of clients that left had ended {time.monotonic() - left:.1f} s later")


def test_what_is_active_survives_the_death_of_the_ledger(fleet: Fleet) -> None:
    fleet.change("POST", "/checkpoints/demo/activate", version="v1")
    (ledger,) = ray_processes("Ledger")
    os.kill(ledger, signal.SIGKILL)
    assert fleet.asks_all() == {"demo@v1"}
    until(lambda: bool(ray_processes("Ledger").keys() - {ledger}))

    def changes() -> bool:
        answer = httpx.post(f"{fleet.url}/checkpoints/demo/activate", json={"version": "v2"}, timeout=60)
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200

    until(changes)
    assert fleet.asks_all(8 * fleet.size) == {"demo@v2"}


def test_running_requests_end_well_when_the_server_is_told_to_stop(fleet: Fleet) -> None:
    async def story() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            body = {**BODY, "max_new_tokens": 400, "stream": True}
            async with http.stream("POST", f"{fleet.url}/generate", json=body) as answer:
                text = ""
                async for part in answer.aiter_text():
                    if not text:
                        os.kill(fleet.pid, signal.SIGTERM)
                    text += part
            assert "event: done" in text
            assert text.count("event: token") > 100

    asyncio.run(story())
    until(lambda: not ray_processes(""))
