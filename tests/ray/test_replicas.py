"""Replicas on a Ray cluster of this machine: changes reach all of them, and what one loses is its own.

`make test-ray` runs them in an environment of their own; they are skipped where Ray is not installed.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.processes import ray_processes, ready_replicas, running
from tests.ray.conftest import BODY, STARTED_S, Fleet, until

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.timeout(600)
LONG = {**BODY, "max_new_tokens": 480, "stream": True}


@pytest.fixture(scope="module", params=[2, 3])
def fleet(folder: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    (folder / ".served.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "server.cli", "serve", "--ray", "--replicas", str(request.param)]
    environment = {"MATSTEER_REPLICA_CPUS": "0.5", "MATSTEER_DRAIN_S": "15"}  # three of them fit on two cores
    with running([*command, "--checkpoints", str(folder), "--log-level", "warning"], environment=environment) as server:
        yield Fleet.at(server.url, server.pid, request.param)


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

    async def ask() -> tuple[bool, float]:
        async with httpx.AsyncClient(timeout=STARTED_S) as http:
            answer = await http.post(f"{fleet.url}/generate", json={**LONG, "stream": False})
            assert answer.status_code in (200, 500), answer.text
            return answer.status_code == 200, time.monotonic()

    async def story() -> tuple[list[tuple[bool, float]], float, list[httpx.Response]]:
        begun = [asyncio.Event() for _ in range(4 * fleet.size)]
        streams = [asyncio.create_task(ask()) for _ in range(2 * fleet.size)]
        streams += [asyncio.create_task(stream(fleet, one)) for one in begun]
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


async def stream(fleet: Fleet, begun: asyncio.Event) -> tuple[bool, float]:
    """Whether a long one came to its end, and when that was."""
    text = ""
    async with httpx.AsyncClient(timeout=STARTED_S) as http:
        try:
            async with http.stream("POST", f"{fleet.url}/generate", json=LONG) as answer:
                async for part in answer.aiter_text():
                    text += part
                    begun.set()
                return answer.status_code == 200 and "event: done" in text, time.monotonic()
        except httpx.HTTPError:
            return False, time.monotonic()


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def slow(pid: int) -> Iterator[None]:
    """It runs for a fifth of the time."""
    over = threading.Event()

    def hold_up() -> None:
        while not over.is_set():
            with standing_still(pid):
                time.sleep(0.4)
            time.sleep(0.1)

    holding = threading.Thread(target=hold_up)
    holding.start()
    try:
        yield
    finally:
        over.set()
        holding.join()


def test_a_slow_replica_answers_and_follows_a_change_and_the_others_are_not_slower(fleet: Fleet) -> None:
    fleet.change("POST", "/checkpoints/demo/activate", version="v1")
    before = ready_replicas()

    async def story() -> tuple[float, list[float]]:
        over, took = asyncio.Event(), []

        async def client(http: httpx.AsyncClient) -> None:
            while not over.is_set():
                began = time.monotonic()
                fleet.version(await http.post(f"{fleet.url}/generate", json=BODY))
                took.append(time.monotonic() - began)

        async with httpx.AsyncClient(timeout=60) as http:
            clients = [asyncio.create_task(client(http)) for _ in range(2 * fleet.size)]
            await asyncio.sleep(4)
            began = time.monotonic()
            changed = await http.post(f"{fleet.url}/checkpoints/demo/activate", json={"version": "v2"})
            made = time.monotonic() - began
            assert changed.status_code == 200, changed.text
            answers = [http.post(f"{fleet.url}/generate", json=BODY) for _ in range(6 * fleet.size)]
            assert {fleet.version(answer) for answer in await asyncio.gather(*answers)} == {"demo@v2"}
            over.set()
            await asyncio.gather(*clients)
        return made, sorted(took)

    with slow(min(before)):
        made, took = asyncio.run(story())
    print(
        f"one of {fleet.size} replicas at a fifth of its speed: {len(took)} answers, the median after "
        f"{took[len(took) // 2]:.2f} s, the last after {took[-1]:.2f} s; a swap took {made:.1f} s"
    )
    assert ready_replicas() == before, "slow is not dead"


def test_a_replica_that_stands_still_keeps_what_it_has_waiting_and_a_change_until_it_goes_on(fleet: Fleet) -> None:
    fleet.change("POST", "/checkpoints/demo/activate", version="v1")
    before = ready_replicas()

    async def story() -> tuple[int, int, float]:
        begun = [asyncio.Event() for _ in range(4 * fleet.size)]
        streams = [asyncio.create_task(stream(fleet, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        async with httpx.AsyncClient(timeout=60) as http:

            async def ask() -> str:
                return fleet.version(await http.post(f"{fleet.url}/generate", json=BODY))

            asked = []
            with standing_still(min(before)):
                for _ in range(12):
                    asked.append(asyncio.create_task(ask()))
                    await asyncio.wait(asked[-1:], timeout=3)
                late = [one for one in asked if not one.done()]
                assert len(late) < 6, "most of those that come later find the others"
                assert {one.result() for one in asked if one.done()} == {"demo@v1"}
                await asyncio.wait(streams, timeout=20, return_when=asyncio.FIRST_COMPLETED)
                path = f"{fleet.url}/checkpoints/demo/activate"
                change = asyncio.create_task(http.post(path, json={"version": "v2"}))
                await asyncio.wait([change], timeout=2)
                assert not change.done(), "it is answered when all have made it"
                assert not any(one.done() for one in late)
                waiting = [one for one in streams if not one.done()]
                assert 0 < len(waiting) < len(streams)
            goes_on = time.monotonic()
            changed = await change
            made = time.monotonic() - goes_on
            assert changed.status_code == 200, changed.text
            assert {await one for one in late} <= {"demo@v1", "demo@v2"}
            ended = await asyncio.gather(*streams)
            assert all(whole for whole, _ in ended), "late, and whole"
        return len(late), len(waiting), made

    late, waiting, made = asyncio.run(story())
    print(
        f"one of {fleet.size} replicas stood still: {late} of the next 12 requests and {waiting} of {4 * fleet.size} "
        f"streams waited for it, a swap until {made:.1f} s after it went on"
    )
    assert ready_replicas() == before
    assert fleet.asks_all(8 * fleet.size) == {"demo@v2"}


def test_a_replica_that_does_not_go_on_is_replaced_and_a_change_waits_for_that(fleet: Fleet) -> None:
    if fleet.size > 2:
        pytest.skip("once is enough: it takes over a minute")
    fleet.change("POST", "/checkpoints/demo/activate", version="v1")
    before, still = ready_replicas(), min(ready_replicas())

    async def story() -> tuple[float, list[tuple[bool, float]], httpx.Response, float, int]:
        begun = [asyncio.Event() for _ in range(4 * fleet.size)]
        streams = [asyncio.create_task(stream(fleet, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        os.kill(still, signal.SIGSTOP)
        stopped, served = time.monotonic(), 0
        async with httpx.AsyncClient(timeout=STARTED_S) as http:

            async def ask() -> int:
                return (await http.post(f"{fleet.url}/generate", json=BODY)).status_code

            asked = [asyncio.create_task(ask()) for _ in range(4)]
            await asyncio.wait(asked, timeout=5)
            path = f"{fleet.url}/checkpoints/demo/activate"
            change = asyncio.create_task(http.post(path, json={"version": "v2"}))
            while not change.done():
                asked.append(asyncio.create_task(ask()))
                await asyncio.wait(asked[-1:], timeout=3)
                served += asked[-1].done()
            changed = time.monotonic()
            statuses = await asyncio.gather(*asked)
            assert set(statuses) <= {200, 500}
            assert served > len(statuses) - 6, "most find the others"
            return stopped, await asyncio.gather(*streams), await change, changed, statuses.count(500)

    try:
        stopped, streams, change, changed, lost = asyncio.run(story())
        until(lambda: not psutil.pid_exists(still))
    finally:
        with suppress(ProcessLookupError):
            os.kill(still, signal.SIGCONT)
    ended = [at - stopped for whole, at in streams if not whole]
    print(
        f"one of {fleet.size} replicas stood still for good: {len(ended)} of {len(streams)} streams were cut after "
        f"{max(ended, default=0):.0f} s, {lost} requests got a 500, a swap was answered after {changed - stopped:.0f} s"
    )
    assert 0 < len(ended) < len(streams)
    assert max(ended) < 90, "three health checks, and what running requests have to end"
    assert change.status_code == 200, change.text
    until(lambda: len(ready_replicas() - before) == 1)
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
