"""The threads that compute: how many, and on which device."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

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


def use_device(device: torch.device) -> None:
    """Makes a GPU this thread's own: what CUDA is asked for without a device, as a kernel to be compiled, is for that
    one. Each thread begins with the first."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
