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
from typing import TypeVar

from server.engine.calls import Answer, Call, Calls
from server.engine.delivery import Delivery
from server.engine.reading import compare, score
from server.engine.runner import Outcome, Runner, Step
from server.engine.scheduler import Scheduler
from server.engine.tape import Work
from server.engine.types import Divergence, EngineStats, Job, Likelihood, Load, Pair, Row, Sink, Steer
from server.errors import DeadlineExceeded, EngineDown, GenerationFailed, QueueFull

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Submit:
    rows: tuple[Row, ...]
    sink: Sink
    at: float


@dataclass(frozen=True)
class _Cancel:
    request: str


class _Wake:
    """Nothing to do but look whether to stop."""


Message = _Submit | _Cancel | Call | _Wake


class Engine:
    """Runs steps until stopped. `submit`, `cancel` and `call` may be used from any thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        decode: Callable[..., str],
        queue_limit: int = 256,
        stall_s: float = 300.0,
        deadline_s: float = 600.0,
    ) -> None:
        self.stats = EngineStats()
        self._runner = runner
        self._scheduler = scheduler
        self._queue_limit = queue_limit
        self._stall_s = stall_s
        self._deadline_s = deadline_s
        self._deadlines: deque[tuple[float, str]] = deque()  # of requests, in the order in which they came
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._calls = Calls()
        self._delivery = Delivery(scheduler, eos=eos, decode=decode, on_unqueued=self._unqueue)
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
        """Stop after the steps that have been begun; whatever is unfinished fails with a message."""
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

    @property
    def open_rows(self) -> int:
        """Rows that have been submitted, taken in, and not ended."""
        return len(self._delivery)

    @property
    def load(self) -> Load:
        """What the engine does now. Read while it runs: its numbers may be a step apart."""
        scheduler, cache = self._scheduler, self._runner.cache
        return Load(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            used_tokens=sum(tape.extent.size for tape in [*scheduler.running] if tape.extent),
            tokens=cache.extents.total,
            shared_tokens=cache.shared_tokens,
            preemptions=scheduler.preemptions,
            threads=self._runner.team.size,
        )

    def submit(self, rows: Sequence[Row], sink: Sink) -> None:
        """Queue the rows of one request; `sink` gets one last event for each of them, and before it, of rows that
        stream, a Piece for each token.

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
        """End the request's rows before the next step is begun; a request that has ended is left alone."""
        self._inbox.put(_Cancel(request))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the engine's thread between two steps: the only safe time to touch model or bank.

        The future's exception is a ServerError whatever `work` raises. Raises EngineDown.
        """

        def job() -> Job[T]:
            yield from ()
            return work()

        return self.begin(job())

    def begin(self, job: Job[T]) -> Future[T]:
        """The same for work in parts: between two of them the engine makes a step, and after `cancel` does no more."""
        future: Answer[T] = Answer()
        with self._lock:
            if self._down is not None:
                raise EngineDown(f"The engine cannot take requests: {self._down}.")
            self._inbox.put(Call(job, future))
        return future

    def compare(self, pair: Pair) -> Future[Divergence]:
        """How far steering moved the model on two finished texts."""
        return self.begin(compare(self._runner, pair))

    def score(
        self, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], steer: Steer, top: int = 0
    ) -> Future[list[tuple[Likelihood, ...]]]:
        """texts: prompts with their continuations -> how likely each token of each continuation is, steered as if it
        were being generated, beside the `top` likeliest in its place."""
        return self.begin(score(self._runner, texts, steer, top))

    # --- the engine's thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._down is None:
                self._receive()
                self._end_late()
                if self._calls:
                    self._delivery.tell()
                    with self._busy():
                        self._scheduler.hold = self._calls.advance()
                if works := self._scheduler.next():
                    self._step(works)
                else:
                    self._delivery.tell()
        except Exception as error:  # a bug in the loop itself: say so, answer everybody, never hang
            log.exception("the engine's loop broke")
            self._close(f"its loop broke: {error}")
        self._shut()

    def _receive(self) -> None:
        """Take in what has arrived; with nothing to do wait for it."""
        if self._scheduler.idle and not self._calls:
            self._delivery.tell()
            self._take(self._inbox.get())
        while (message := self._poll()) is not None:
            self._take(message)

    def _poll(self) -> Message | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            return None

    def _take(self, message: Message) -> None:
        match message:
            case _Submit(rows, sink, at):
                self._delivery.begin(rows, sink, at)
                self._deadlines.append((at + self._deadline_s, rows[0].request))
            case _Cancel(request):
                self._delivery.cancel(request)
            case Call():
                self._calls.add(message)

    @property
    def _late(self) -> bool:
        return bool(self._deadlines) and self._deadlines[0][0] < time.monotonic()

    def _end_late(self) -> None:
        """Requests whose time is up fail, wherever their rows are."""
        while self._late:
            _, request = self._deadlines.popleft()
            self._delivery.give_up(request, DeadlineExceeded(f"The request took longer than {self._deadline_s:g} s."))

    def _step(self, works: Sequence[Work]) -> None:
        """One step, and those that follow from it: where the host is free while the device computes, each is begun
        before the tokens of the one before are known."""
        self.stats.rows += self._delivery.admit(works)
        step: Step | None = None
        while works:
            with self._busy():
                step = step or self._runner.launch(works)
                ahead = self._ahead(works)
                following = self._runner.launch(ahead, step) if ahead else None
                self._delivery.tell()
                try:
                    outcomes = step.outcomes()
                except Exception as error:
                    self._fail(works, error)
                    return
                self._deliver(works, outcomes)
            works, step = ahead, following

    def _ahead(self, works: Sequence[Work]) -> Sequence[Work]:
        """The works to begin while these are computed: none where anybody else wants something."""
        if not self._runner.overlaps or self._calls or self._late or not self._inbox.empty():
            return ()
        return self._scheduler.ahead(works)

    def _deliver(self, works: Sequence[Work], outcomes: Sequence[Outcome]) -> None:
        self.stats.steps += 1
        self.stats.largest_batch = max(self.stats.largest_batch, len(works))
        self.stats.computed_tokens += sum(map(len, works))
        for work, outcome in zip(works, outcomes, strict=True):
            if work.tape.extent is None:
                # It has ended: with the step before, or its request has failed with another row.
                if outcome.draw and not outcome.draw.finite:
                    self._runner.cache.wipe()
                continue
            self._scheduler.done(work, outcome.steered)
            if outcome.draw is not None:
                self.stats.tokens += 1
                self._delivery.deliver(work.tape, outcome.draw)
        if not self._runner.overlaps:
            self._delivery.tell()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """While this lasts longer than `stall_s`, the engine is in trouble."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        """A failing step fails the requests in it, and nobody else, as long as the device still answers."""
        log.error("a step with %d rows failed", len(works), exc_info=error)
        self.stats.failed_steps += 1
        for request in dict.fromkeys(work.tape.row.request for work in works if work.tape.row and work.tape.extent):
            failure = GenerationFailed("The model failed on this request's batch; try again.")
            self._delivery.give_up(request, failure, keep=False)
        try:
            self._runner.recover()
        except Exception as fatal:
            log.critical("the device does not answer any more", exc_info=fatal)
            self._close(f"the device failed: {fatal}")

    def _unqueue(self, rows: int) -> None:
        if rows:
            with self._lock:
                self._queued -= rows

    def _close(self, why: str) -> None:
        with self._lock:
            self._down = self._down or why
        self._inbox.put(_Wake())

    def _shut(self) -> None:
        """Answer everything that is left. Nothing new can arrive: submit and call look at _down under the lock."""
        while (message := self._poll()) is not None:
            self._take(message)
        why = EngineDown(f"The engine stopped: {self._down}.")
        self._delivery.clear(why)
        self._calls.end(why)
