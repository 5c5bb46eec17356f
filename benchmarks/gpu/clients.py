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


class Clients:
    """Processes, kept from run to run: no run waits for them to start. Use it as a context manager."""

    def __init__(self, url: str, most: int) -> None:
        """`most`: clients of any run. Half of the cores are left to the server."""
        self._url = url
        self._count = min(most, max(1, (os.cpu_count() or 1) // 2))
        context = multiprocessing.get_context("spawn")
        everybody = context.Barrier(self._count)
        self._pool = ProcessPoolExecutor(self._count, mp_context=context, initializer=_meet, initargs=(everybody,))

    def __enter__(self) -> "Clients":
        list(self._pool.map(_nothing, range(self._count)))
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def closed_loop(self, bodies: Bodies, clients: int) -> Summary:
        """All requests, each of `clients` clients the next one when its last is answered. Raises RuntimeError where
        one fails."""
        processes = min(clients, self._count)
        shares = [range(index, clients, processes) for index in range(processes)]
        jobs = [
            self._pool.submit(_closed_loop, self._url, [bodies[each::clients] for each in share]) for share in shares
        ]
        found = [job.result() for job in jobs]
        began, ended = min(one[0] for one in found), max(one[1] for one in found)
        summary = Summary.of(f"{clients} clients", [each for one in found for each in one[2]], ended - began)
        if summary.failed:
            raise RuntimeError(f"{summary.failed} of {summary.requests} requests failed: {summary.first_error}")
        return summary


def _meet(everybody: Barrier) -> None:
    """Waits until all processes have begun."""
    everybody.wait()


def _nothing(number: int) -> None:
    """Makes a process begin."""


def _closed_loop(url: str, bodies: Sequence[Bodies]) -> tuple[float, float, list[Outcome]]:
    """When it began and ended, by the clock that all processes share, and what became of every client's requests."""

    async def client(http: httpx.AsyncClient, own: Bodies) -> list[Outcome]:
        return [await send(http, body) for body in own]

    async def run() -> list[list[Outcome]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
            return await asyncio.gather(*(client(http, own) for own in bodies))

    began = time.monotonic()
    outcomes = asyncio.run(run())
    return began, time.monotonic(), [each for one in outcomes for each in one]
