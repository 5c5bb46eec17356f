"""Clients in processes of their own: one process could not take what a GPU makes."""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import httpx

from server.bench import Outcome, Summary, send

Bodies = Sequence[Mapping[str, Any]]
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'
)
_taken: Any = None  # in a client's process: how many requests of this run clients have taken, in all processes


class Clients:
    """Processes, kept from run to run: no run waits for them to start, or for what a first request loads. Use it as a
    context manager."""

    def __init__(self, url: str, most: int) -> None:
        """`most`: clients of any run. Half of the cores are left to the server."""
        self.url = url
        self._count = min(most, max(1, (os.cpu_count() or 1) // 2))
        context = multiprocessing.get_context("spawn")
        self._taken = context.Value("q", 0)
        given = context.Barrier(self._count), self._taken
        self._pool = ProcessPoolExecutor(self._count, mp_context=context, initializer=_begin, initargs=given)

    def __enter__(self) -> "Clients":
        list(self._pool.map(_nothing, range(self._count)))
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def closed_loop(self, bodies: Bodies, clients: int) -> Summary:
        """All requests in their order, each by the first of `clients` clients that has no other one. Raises
        RuntimeError where one fails."""
        processes = min(clients, self._count)
        self._taken.value = 0
        jobs = [
            self._pool.submit(_closed_loop, self.url, bodies, len(range(index, clients, processes)))
            for index in range(processes)
        ]
        found = [job.result() for job in jobs]
        began, ended = min(one[0] for one in found), max(one[1] for one in found)
        summary = Summary.of(f"{clients} clients", [each for one in found for each in one[2]], ended - began)
        if summary.failed:
            raise RuntimeError(f"{summary.failed} of {summary.requests} requests failed: {summary.first_error}")
        return summary

    def one_by_one(self, bodies: Bodies) -> list[float]:
        """Seconds of each request: from one process, and over a connection of its own. Raises RuntimeError where one
        fails."""
        found = self._pool.submit(_one_by_one, self.url, bodies).result()
        for outcome in found:
            if outcome.error is not None:
                raise RuntimeError(f"a request failed: {outcome.error}")
        return [outcome.total for outcome in found]


def _begin(everybody: Barrier, taken: Any) -> None:
    """Waits until all processes have begun."""
    global _taken
    _taken = taken
    asyncio.run(_rehearse())
    everybody.wait()


async def _rehearse() -> None:
    """Loads all that a request needs by sending one, but not to the server."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, _http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as http:
        outcome = await send(http, {})
    assert outcome.error is None, outcome.error


def _nothing(number: int) -> None:
    """Makes a process begin."""


def _http(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))


def _closed_loop(url: str, bodies: Bodies, clients: int) -> tuple[float, float, list[Outcome]]:
    """When it began and ended, by the clock that all processes share, and what became of this process' requests."""
    outcomes: list[Outcome] = []

    async def client(http: httpx.AsyncClient) -> None:
        while (index := _take()) < len(bodies):
            outcomes.append(await send(http, bodies[index]))

    async def run() -> tuple[float, float]:
        async with _http(url) as http:
            began = time.monotonic()
            await asyncio.gather(*(client(http) for _ in range(clients)))
            return began, time.monotonic()

    return *asyncio.run(run()), outcomes


def _take() -> int:
    """Which request of all is next."""
    with _taken.get_lock():
        _taken.value += 1
        return int(_taken.value) - 1


def _one_by_one(url: str, bodies: Bodies) -> list[Outcome]:
    async def run() -> list[Outcome]:
        outcomes = []
        for body in bodies:
            async with _http(url) as http:
                outcomes.append(await send(http, body))
        return outcomes

    return asyncio.run(run())
