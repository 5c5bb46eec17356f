"""Work between two steps: jobs that need the model or the bank and are no rows."""

import logging
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from server.engine.types import Job
from server.errors import GenerationFailed, ServerError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Answer(Future[T]):
    """What a job will say; also when the job has begun it knows whether anybody still waits for it."""

    unwanted = False

    def cancel(self) -> bool:
        self.unwanted = True
        return super().cancel()


@dataclass(frozen=True)
class Call:
    """A job, and whom its result is for."""

    job: Job[Any]
    future: Answer[Any]


class Calls:
    """Jobs in the order in which they came, one after the other."""

    def __init__(self) -> None:
        self._waiting: deque[Call] = deque()
        self._begun: Call | None = None

    def __bool__(self) -> bool:
        return self._begun is not None or bool(self._waiting)

    def add(self, call: Call) -> None:
        self._waiting.append(call)

    def advance(self) -> bool:
        """Does one part of one job, so that calls delay nobody for long; returns whether it waits for space. A job for
        which nobody waits any more ends between two parts."""
        if self._begun is not None and self._begun.future.unwanted:
            self._begun.job.close()
            self._begun.future.set_exception(GenerationFailed("Nobody waits for this any more."))
            self._begun = None
            return False
        if self._begun is None:
            call = self._waiting.popleft()
            if not call.future.set_running_or_notify_cancel():
                return False
            self._begun = call
        future = self._begun.future
        try:
            return next(self._begun.job)
        except StopIteration as done:
            future.set_result(done.value)
        except ServerError as error:
            future.set_exception(error)
        except Exception as error:
            log.error("work between two steps failed", exc_info=error)
            failure = GenerationFailed("The model failed on work for this request; try again.")
            failure.__cause__ = error
            future.set_exception(failure)
        self._begun = None
        return False

    def end(self, why: ServerError) -> None:
        """Nothing more is done: everybody who waits is told why."""
        if self._begun is not None:
            self._begun.job.close()
            self._begun.future.set_exception(why)
        for call in self._waiting:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(why)
        self._begun = None
        self._waiting.clear()
