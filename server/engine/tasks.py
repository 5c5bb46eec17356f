"""Work that needs the model or the bank between two steps, and futures of what the engine will say."""

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from server.errors import ServerError, failure_of

log = logging.getLogger(__name__)
T = TypeVar("T")


class TaskFuture(Future[T]):
    """What the engine will say. `cancel` also stops what has begun."""

    def __init__(self, on_cancel: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._on_cancel = on_cancel

    def cancel(self) -> bool:
        cancelled = super().cancel()
        self._on_cancel()
        return cancelled

    def settle(self, result: "T | ServerError") -> None:
        """Once, from the engine's thread; nobody is told where nobody waits any more."""
        if not self.set_running_or_notify_cancel():
            return
        if isinstance(result, ServerError):
            self.set_exception(result)
        else:
            self.set_result(result)


@dataclass(frozen=True)
class EngineTask:
    """Something to do on the engine's thread, and whom its result is for."""

    work: Callable[[], Any]
    future: TaskFuture[Any]

    def run(self) -> None:
        """The future's exception is a ServerError whatever the work raises."""
        if not self.future.set_running_or_notify_cancel():
            return
        with suppress(InvalidStateError):  # the queue has been closed meanwhile
            try:
                result = self.work()
            except ServerError as error:
                self.future.set_exception(error)
            except Exception as error:
                log.error("work between two steps failed", exc_info=error)
                failure = failure_of(error, "work for this request")
                failure.__cause__ = error
                self.future.set_exception(failure)
            else:
                self.future.set_result(result)


class TaskQueue:
    """Tasks in the order in which they came, one between two steps."""

    def __init__(self) -> None:
        self._waiting: deque[EngineTask] = deque()
        self._running: EngineTask | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, task: EngineTask) -> None:
        self._waiting.append(task)

    def run_next(self) -> None:
        """Runs one, so that tasks delay nobody for long."""
        self._running = self._waiting.popleft()
        self._running.run()
        self._running = None

    def close(self, why: ServerError) -> None:
        """Nothing more is done: everybody who waits is told why, also for what is being done."""
        if self._running is not None:
            with suppress(InvalidStateError):
                self._running.future.set_exception(why)
        while self._waiting:
            self._waiting.popleft().future.settle(why)
