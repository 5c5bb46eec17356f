"""Threads: how many compute, and whose they are; those for what is slow."""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # a process without a model needs no PyTorch
    import torch

T = TypeVar("T")

WINDOW = 0.5  # seconds of steps that are judged together
CROWDED = 0.5  # threads of this process that wait for a core, on average: 0.01 when quiet, 0.2 to 0.4 beside clients
PAUSE = 2.0  # seconds until a larger team is tried again; doubled each time that it is crowded out at once
LONGEST_PAUSE = 60.0


class ThreadScaler:
    """The threads that the engine computes with: as many as find a core. Its thread looks before each step.

    A parallel region ends with its last thread. Where another process or thread wants one of the cores, the operating
    system puts a thread of the team aside and the others wait for it, at each of a step's hundreds of regions: two
    threads are then three times slower than one (benchmarks/README.md). Linux says how long threads have waited for a
    core; as many as wait leave the team, and come back to see whether there is room again.
    """

    def __init__(
        self, size: int, waited: Callable[[], float | None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`size`: threads at most. `waited`: seconds that this process' threads have waited for a core so far; None:
        this system does not say."""
        self.size = self.most = size
        self._waited = waited or waited_for_cores
        self._clock = clock
        self._pause = PAUSE
        self._changed = self._ended = clock()
        self._window: tuple[float, float | None] | None = None  # when it began, and what had been waited for by then

    def look(self) -> None:
        """Judge the steps since the last judgement, and let threads leave or come back."""
        if self.most == 1:
            return
        now = self._clock()
        pausing = now - self._ended > WINDOW
        if self._window is None or pausing:  # nothing was computed for a while: that says nothing about cores
            self._window = now, self._waited()
        elif now - self._window[0] >= WINDOW:
            (began, before), after = self._window, self._waited()
            self._window = now, after
            if before is not None and after is not None:
                self._judge((after - before) / (now - began), began, now)

    def ended(self) -> None:
        """A step has ended, however long it took: what follows may be a pause."""
        self._ended = self._clock()

    def _judge(self, waiting: float, began: float, now: float) -> None:
        if waiting > CROWDED and self.size > 1:
            at_once = began - self._changed < PAUSE - WINDOW
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if at_once else PAUSE
            self._resize(max(1, self.size - max(1, round(waiting))), now)
        elif self.size < self.most and now - self._changed > self._pause:
            self._resize(min(2 * self.size, self.most), now)

    def _resize(self, size: int, now: float) -> None:
        import torch

        self.size, self._changed = size, now
        torch.set_num_threads(size)


def waited_for_cores() -> float | None:
    """Seconds that this process' threads were ready to run and did not (Linux, Documentation/scheduler/sched-stats).
    None where the system does not say."""
    total, known = 0, False
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
            known = True
        except OSError:  # the thread has ended
            continue
    return total / 1e9 if known else None


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use, which in a container are fewer than the machine has: those it may run on,
    or the share of them that its control group may take (cgroup v2's `cpu.max`), whichever is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
        return cores if allowed == "max" else max(1, min(cores, int(allowed) // int(period)))
    except (OSError, ValueError):
        return cores


def use_device(device: "torch.device") -> None:
    """Makes a GPU this thread's own: what CUDA is asked for without a device, as a kernel to be compiled, is for that
    one. Each thread begins with the first."""
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


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
