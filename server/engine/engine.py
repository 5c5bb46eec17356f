"""The engine: one thread that owns the model, fed through an inbox, answering through sinks."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from server.engine.progress import Progress
from server.engine.scheduler import Scheduler
from server.engine.types import Batch, Divergence, Draw, EngineStats, Event, Failed, Pair, Row, Sink
from server.errors import EngineDown, GenerationFailed, NotFinite, QueueFull, ServerError

log = logging.getLogger(__name__)
KEPT_BATCHES = 64
T = TypeVar("T")


class Steps(Protocol):
    """What the engine asks of a runner."""

    def step(self, batch: Batch) -> Sequence[Draw]:
        """One forward and one draw for each row of the batch, in its order."""

    def compare(self, pair: Pair) -> Divergence:
        """Teacher-forced comparison of two finished texts."""

    def rest(self) -> None:
        """Nothing is left to do: free what the last batch held."""

    def recover(self) -> None:
        """Forget the batch after a failed step; raises when the device is gone."""


@dataclass(frozen=True)
class _Submit:
    rows: tuple[Row, ...]
    sink: Sink
    at: float


@dataclass(frozen=True)
class _Cancel:
    request: str


@dataclass(frozen=True)
class _Call:
    work: Callable[[], Any]
    future: Future[Any]


class _Wake:
    """Nothing to do but look whether to stop."""


Message = _Submit | _Cancel | _Call | _Wake


class Engine:
    """Runs batches until stopped. `submit`, `cancel` and `call` may be used from any thread."""

    def __init__(
        self,
        runner: Steps,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        decode: Callable[..., str],
        queue_limit: int = 256,
        gather_s: float = 0.0,
        stall_s: float = 300.0,
    ) -> None:
        self.stats = EngineStats()
        self._runner = runner
        self._scheduler = scheduler
        self._eos = eos
        self._decode = decode
        self._queue_limit = queue_limit
        self._gather_s = gather_s
        self._stall_s = stall_s
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._calls: deque[_Call] = deque()
        self._progress: dict[Row, Progress] = {}
        self._lock = threading.Lock()  # guards _queued, _down and _draining
        self._queued = 0  # rows submitted and not yet admitted
        self._down: str | None = "the engine has not started"
        self._draining = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for any thread -------------------------------------------------------------------------

    def start(self) -> None:
        self._down = None
        self._thread.start()

    def drain(self) -> None:
        """Take no new requests, and go on with those there are until `stop`."""
        with self._lock:
            self._draining = True

    def stop(self) -> None:
        """Stop after the current step; whatever is unfinished fails with a message."""
        self._close("the server is shutting down")
        if self._thread.is_alive():
            self._thread.join()

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None when the engine is alive."""
        busy_since = self._busy_since
        if self._down is None and busy_since is not None and time.monotonic() - busy_since > self._stall_s:
            return f"the current step has been running for more than {self._stall_s:g} s"
        return self._down or ("the server is draining: it finishes its requests and stops" if self._draining else None)

    def submit(self, rows: Sequence[Row], sink: Sink) -> None:
        """Queue the rows of one request; `sink` gets one last event for each of them.

        Raises QueueFull, EngineDown.
        """
        with self._lock:
            if self._down is not None or self._draining:
                raise EngineDown(f"The engine cannot take requests: {self._down or 'the server is shutting down'}.")
            if self._queued and self._queued + len(rows) > self._queue_limit:
                raise QueueFull(f"{self._queued} rows are waiting already (limit {self._queue_limit}); try again soon.")
            self._queued += len(rows)
            self._inbox.put(_Submit(tuple(rows), sink, time.monotonic()))

    def cancel(self, request: str) -> None:
        """End the request's rows before the next step; a request that has ended is left alone."""
        self._inbox.put(_Cancel(request))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the engine's thread between two steps: the only safe time to touch model or bank.

        The future's exception is a ServerError whatever `work` raises. Raises EngineDown.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._down is not None:
                raise EngineDown(f"The engine cannot take requests: {self._down}.")
            self._inbox.put(_Call(work, future))
        return future

    def compare(self, pair: Pair) -> Future[Divergence]:
        """Measure how far steering moved the model on two finished texts, between two steps."""
        return self.call(lambda: self._runner.compare(pair))

    # --- the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._down is None:
                self._receive()
                self._work_off()
                if batch := self._scheduler.next():
                    self._step(batch)
        except Exception as error:  # a bug in the loop itself: say so, answer everybody, never hang
            log.exception("the engine's loop broke")
            self._close(f"its loop broke: {error}")
        self._shut()

    def _receive(self) -> None:
        """Take in what has arrived; with nothing to do wait for it, and briefly for its company."""
        if self._scheduler.idle and not self._calls:
            self._runner.rest()
            message = self._inbox.get()
            self._take(message)
            if isinstance(message, _Submit):
                self._gather()
        while (message_or_none := self._poll(0)) is not None:
            self._take(message_or_none)

    def _gather(self) -> None:
        deadline = time.monotonic() + self._gather_s
        while not self._scheduler.full and (left := deadline - time.monotonic()) > 0:
            if (message := self._poll(left)) is not None:
                self._take(message)

    def _poll(self, timeout_s: float) -> Message | None:
        try:
            return self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None

    def _take(self, message: Message) -> None:
        match message:
            case _Submit(rows, sink, at):
                self._progress |= {row: Progress(row, sink, at, self._eos, self._decode) for row in rows}
                self._scheduler.add(rows)
            case _Cancel(request):
                for progress in self._drop(request):
                    self._end(progress.finish("cancelled"))
            case _Call():
                self._calls.append(message)

    def _work_off(self) -> None:
        """One call a step, so that calls delay nobody for long."""
        if not self._calls:
            return
        call = self._calls.popleft()
        if not call.future.set_running_or_notify_cancel():
            return
        with self._busy():
            try:
                call.future.set_result(call.work())
            except ServerError as error:
                call.future.set_exception(error)
            except Exception as error:
                log.error("work between two steps failed", exc_info=error)
                failure = GenerationFailed("The model failed on work for this request; try again.")
                failure.__cause__ = error
                call.future.set_exception(failure)

    def _step(self, batch: Batch) -> None:
        if batch.fresh:
            self._admit(batch)
        with self._busy():
            try:
                draws = self._runner.step(batch)
            except Exception as error:
                self._fail(batch, error)
                return
            for row, draw in zip(batch.rows, draws, strict=True):
                if row in self._progress:  # else its request has failed with a row before it
                    self._deliver(row, draw)
            self.stats.steps += 1
            self.stats.tokens += len(draws)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """While this lasts longer than `stall_s`, the engine is in trouble."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _deliver(self, row: Row, draw: Draw) -> None:
        """One draw to its row; a row that cannot go on fails its request only."""
        if not draw.finite:
            log.error("the logits of a row of request %s are not finite", row.request)
            self._give_up(row.request, NotFinite("The model's output is not finite: there is no next token."))
            return
        progress = self._progress[row]
        try:
            reason = progress.accept(draw)
            event = progress.finish(reason) if reason else None
        except Exception:
            log.exception("the text of a row of request %s cannot be decoded", row.request)
            self._give_up(row.request, GenerationFailed("The generated tokens could not be turned into text."))
            return
        if event is not None:
            self._scheduler.finish(row)
            self._end(event)

    def _give_up(self, request: str, error: ServerError) -> None:
        """Fail every row of a request: its client gets no answer, whatever the others would have become."""
        for progress in self._drop(request):
            self._end(Failed(progress.row, error))

    def _drop(self, request: str) -> list[Progress]:
        """Take a request's rows out, wherever they are; each still owes its last event."""
        dropped = [self._progress[row] for row in self._scheduler.drop(request)]
        self._unqueue(sum(not progress.admitted for progress in dropped))
        return dropped

    def _admit(self, batch: Batch) -> None:
        for row in batch.rows:
            self._progress[row].admit()
        self._unqueue(len(batch.rows))
        self.stats.batches += 1
        self.stats.rows += len(batch.rows)
        self.stats.largest_batch = max(self.stats.largest_batch, len(batch.rows))
        self.stats.recent_batches = [*self.stats.recent_batches, len(batch.rows)][-KEPT_BATCHES:]

    def _fail(self, batch: Batch, error: Exception) -> None:
        """A failing step fails the requests in it, and nobody else, as long as the device still answers."""
        log.error("a step with %d rows failed", len(batch.rows), exc_info=error)
        self.stats.failed_steps += 1
        for request in dict.fromkeys(row.request for row in batch.rows):
            self._give_up(request, GenerationFailed("The model failed on this request's batch; try again."))
        try:
            self._runner.recover()
        except Exception as fatal:
            log.critical("the device does not answer any more", exc_info=fatal)
            self._close(f"the device failed: {fatal}")

    def _end(self, event: Event) -> None:
        progress = self._progress.pop(event.row)
        try:
            progress.sink(event)
        except Exception:  # a sink whose event loop has closed must not take the engine down
            log.exception("nobody took the last event of request %s", event.row.request)

    def _unqueue(self, rows: int) -> None:
        with self._lock:
            self._queued -= rows

    def _close(self, why: str) -> None:
        with self._lock:
            self._down = self._down or why
        self._inbox.put(_Wake())

    def _shut(self) -> None:
        """Answer everything that is left. Nothing new can arrive: submit and call look at _down under the lock."""
        while (message := self._poll(0)) is not None:
            self._take(message)
        why = EngineDown(f"The engine stopped: {self._down}.")
        for row in self._scheduler.clear():
            self._end(Failed(row, why))
        for call in self._calls:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(why)
        self._calls.clear()
