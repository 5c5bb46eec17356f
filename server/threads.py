"""Threads for what is slow, and the cores that there are for all of them."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use, which in a container are fewer than the machine has: those it may run on,
    or the share of them that its control group may take (cgroup v2's `cpu.max`), whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        return cores if allowed == "max" else max(1, min(cores, int(allowed) // int(period)))
    except (OSError, ValueError):
        return cores


def run_in_disposable_thread(work: Callable[[], T]) -> T:
    """The result of `work`, done on a thread that ends with it.

    OpenMP keeps a team of workers for every thread that has ever computed something in parallel. As soon as there are
    more of them than cores, GNU's runtime stops waiting actively for the next parallel region, and a decoding step,
    which has hundreds, takes twice as long (benchmarks/README.md). So nothing but the engine's thread may keep a team.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()


async def result_of(future: "Future[T]") -> T:
    """Of what is done on a thread, for a coroutine."""
    return await asyncio.wrap_future(future)


class KeyedThreads:
    """Threads for slow work. Work with the same key is done one piece at a time, in order, and holds one thread at
    most, however much of it there is: what has another key finds the next one free."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Callable[[], None]]] = {}  # of the keys that have a thread, or wait for one

    def submit(self, key: str, work: Callable[[], T]) -> Future[T]:
        """The future may be cancelled while the work waits."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            idle = key not in self._waiting
            self._waiting.setdefault(key, deque()).append(run)
        if idle:
            self._pool.submit(self._run_next, key)
        return future

    def busy(self, key: str) -> bool:
        """Whether work with that key is done, or waits."""
        with self._lock:
            return key in self._waiting

    def _run_next(self, key: str) -> None:
        """One piece; the rest of the key goes behind the other keys."""
        with self._lock:
            run = self._waiting[key].popleft()
        run()
        with self._lock:
            more = bool(self._waiting[key])
            if not more:
                del self._waiting[key]
        if more:
            self._pool.submit(self._run_next, key)
