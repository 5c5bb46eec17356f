"""The engine: one thread that owns the model, fed through an inbox, answering through event sinks."""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from server.engine.compute_threads import use_device
from server.engine.divergence import Divergence
from server.engine.gate_stats import AttributeStats
from server.engine.model_runner import InFlightStep, ModelRunner
from server.engine.output_processor import OutputProcessor
from server.engine.scheduler import Scheduler
from server.engine.scoring import ComparisonPair, ScoreCollector, to_score
from server.engine.sequence import (
    OWN_SHARE,
    EngineStats,
    EngineStatus,
    Event,
    EventSink,
    ScheduledChunk,
    Scored,
    Sequence,
    ShareKey,
    SteeringParams,
    StepOutput,
    TokenLogprob,
    unique_requests,
)
from server.engine.tasks import EngineTask, TaskFuture, TaskQueue
from server.engine.text_builder import Decoders
from server.errors import (
    DeadlineExceeded,
    EngineDown,
    NotFinite,
    PromptTooLong,
    QueueFull,
    ServerError,
    failure_of,
)
from server.tokenizer import Decode
from steering.types import Handle

log = logging.getLogger(__name__)
LAST_STEP_S = 0.2  # `stop` waits so long for a step before it answers in the engine's place
T = TypeVar("T")
Chunks = tuple[ScheduledChunk, ...]


@dataclass(frozen=True)
class _Submit:
    sequences: tuple[Sequence, ...]
    on_event: EventSink
    at: float
    counted: bool  # against the queue's limit


@dataclass(frozen=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True)
class _Stop:
    request_id: str
    index: int  # of the sequence in its request


class _Wake:
    """Nothing to do but look whether to stop."""


Message = _Submit | _Cancel | _Stop | EngineTask | _Wake


class _Abandoned(BaseException):
    """What was computed has ended after `stop` has answered everybody: there is nothing left to do."""


class Engine:
    """Runs steps until stopped. `submit`, `cancel`, `call`, `score` and `compare` may be used from any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        decode: Decode | None,
        decode_all: Decode | None = None,
        queue_limit: int = 256,
        stall_s: float = 300.0,
        deadline_s: float = 600.0,
    ) -> None:
        """Without `decode` no texts are made: whoever takes the events makes them of the tokens (`SequenceOutput`), and
        calls `stop_sequence` where a stop string is complete."""
        self.stats = EngineStats()
        self.on_flush: Callable[[], None] = lambda: None  # called on the engine's thread after the events of a step
        self._runner = runner
        self._scheduler = scheduler
        self._queue_limit = queue_limit
        self._stall_s = stall_s
        self._deadline_s = deadline_s
        self._deadlines: dict[str, float] = {}  # of requests, in the order in which they came
        self._names = itertools.count()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._tasks = TaskQueue()
        self._outputs = OutputProcessor(
            scheduler,
            eos=eos,
            decoders=Decoders.of(decode, decode_all) if decode else None,
            on_dequeued=self._dequeued,
            on_request_end=self._request_ended,
            on_flush=lambda: self.on_flush(),
        )
        self._lock = threading.Lock()  # guards _queued, _down, _draining, _computing and _abandoned
        self._queued = 0  # sequences submitted and not yet admitted
        self._down: str | None = "the engine has not started"
        self._failure: str | None = None
        self._draining = False
        self._busy_since: float | None = None
        self._computing = False  # the engine's thread is inside what may take long
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- for any thread -------------------------------------------------------------------------

    def start(self, *, thread: bool = True) -> None:
        """Without a thread, who calls `step` drives the engine."""
        self._down = None
        if thread:
            self._thread.start()

    def drain(self) -> None:
        """Take no new requests, and go on with those there are until `stop`."""
        with self._lock:
            self._draining = True

    def stop(self) -> None:
        """Stop after the steps that have been begun; whatever is unfinished fails with a message, before such a step
        has ended where that takes long."""
        self._close(self._stalled or "the server is shutting down")
        while self._thread.is_alive():
            self._thread.join(None if self._abandoned else LAST_STEP_S)
            with self._lock:
                abandon = self._computing and not self._abandoned
                self._abandoned |= abandon
            if abandon:
                self._shut()

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None when the engine is alive."""
        draining = "the server is draining: it finishes its requests and stops" if self._draining else None
        return self._down or self._stalled or draining

    @property
    def failure(self) -> str | None:
        """Why no request will be served any more, though nobody has stopped the engine: its process has to end."""
        return self._failure or self._stalled

    @property
    def _stalled(self) -> str | None:
        busy_since = self._busy_since
        if busy_since is None or time.monotonic() - busy_since <= self._stall_s:
            return None
        return f"the current step has been running for more than {self._stall_s:g} s (MATSTEER_STALL_S)"

    @property
    def open_sequences(self) -> int:
        """Sequences that have been submitted, taken in, and not ended."""
        return len(self._outputs)

    @property
    def max_pair_tokens(self) -> int:
        """How many tokens each of two texts may have that are compared."""
        blocks = self._runner.blocks
        return blocks.num_blocks // 2 * blocks.block_size

    def gate_stats(self, handle: Handle) -> Mapping[str, AttributeStats]:
        """What the columns of a checkpoint did to the tokens that were looked at, by attribute."""
        return self._runner.gate_stats.of(handle)

    @property
    def status(self) -> EngineStatus:
        """What the engine does now. Read while it runs: its numbers may be a step apart."""
        scheduler, blocks = self._scheduler, self._runner.blocks
        return EngineStatus(
            running=sum(not sequence.is_scored for sequence in [*scheduler.running]),
            scoring=self._outputs.num_scored,
            waiting=sum(not sequence.is_scored for sequence in scheduler.waiting),
            used_blocks=blocks.num_blocks - blocks.num_free_blocks,
            num_blocks=blocks.num_blocks,
            block_size=blocks.block_size,
            cached_tokens=blocks.cached_tokens,
            queried_tokens=blocks.queried_tokens,
            preemptions=scheduler.preemptions,
            threads=self._runner.thread_scaler.size,
        )

    def submit(self, sequences: list[Sequence], on_event: EventSink) -> None:
        """Queue the sequences of one request; `on_event` gets one last event for each of them, and before it, of those
        that stream, a TokenEvent for each token.

        Raises QueueFull, EngineDown.
        """
        self._submit(sequences, on_event, counted=True)

    def cancel(self, request_id: str) -> None:
        """End the request's sequences before the next step is begun; a request that has ended is left alone."""
        self._inbox.put(_Cancel(request_id))

    def stop_sequence(self, request_id: str, index: int) -> None:
        """End one sequence of a request with the tokens that it has, before the next step is begun."""
        self._inbox.put(_Stop(request_id, index))

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on the engine's thread between two steps: the only safe time to touch model or bank.

        The future's exception is a ServerError whatever `work` raises. Raises EngineDown.
        """
        future: TaskFuture[T] = TaskFuture()
        with self._lock:
            if self._down is not None:
                raise EngineDown(f"The engine cannot take requests: {self._down}.")
            self._inbox.put(EngineTask(work, future))
        return future

    def warm_up(self) -> Future[None]:
        """See `ModelRunner.warm_up`; before the first request."""
        return self.call(self._runner.warm_up)

    def score(
        self,
        texts: list[tuple[tuple[int, ...], tuple[int, ...]]],
        steering: SteeringParams,
        top: int = 0,
        *,
        share: ShareKey = OWN_SHARE,
    ) -> Future[list[tuple[TokenLogprob, ...]]]:
        """texts: prompts with their continuations -> how likely each token of each continuation is, steered as if it
        were being generated, beside the `top` likeliest in its place. `share`: of the request that they are a part of.
        Raises QueueFull, EngineDown, PromptTooLong."""
        name = f"score-{next(self._names)}"
        sequences = [to_score(name, index, *text, steering, top, share) for index, text in enumerate(texts)]
        return self._scored(name, sequences, lambda scored: [one.logprobs for one in scored], counted=True)

    def compare(self, pair: ComparisonPair, *, share: ShareKey = OWN_SHARE) -> Future[Divergence]:
        """How far steering moved the model on two finished texts of the request whose `share` it is, which has been
        counted against the queue's limit already. Raises EngineDown, PromptTooLong."""
        name = f"compare-{next(self._names)}"
        return self._scored(name, pair.sequences(name, share), Divergence.of, counted=False)

    # --- the engine's thread --------------------------------------------------------------------

    def step(self, *, wait: bool = False) -> None:
        """One turn of the loop: messages, a task between steps or the capture of a graph, a forward pass. `wait`: for a
        message, where there is nothing to do."""
        self._receive(wait)
        self._end_late()
        if self._tasks:
            self._outputs.flush()
            with self._busy(), self._long():
                self._tasks.run_next()
        elif self._runner.graphs_due:
            self._outputs.flush()
            with self._busy(), self._long():
                self._runner.capture_next_graph()
        if chunks := self._scheduler.schedule():
            self._execute(chunks)
        else:
            self._outputs.flush()

    def _run(self) -> None:
        try:
            use_device(self._runner.device)
            while self._down is None:
                self.step(wait=True)
        except _Abandoned:
            return
        except Exception as error:  # a bug in the loop itself: say so, answer everybody, never hang
            log.exception("the engine's loop broke")
            self._fail_for_good(f"the engine's loop broke: {error}")
        self._shut()

    def _receive(self, wait: bool) -> None:
        """Take in what has arrived; with nothing to do wait for it."""
        if wait and self._scheduler.idle and not self._tasks and not self._runner.graphs_due:
            self._outputs.flush()
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
            case _Submit(sequences, on_event, at, counted):
                self._deadlines[sequences[0].request_id] = at + self._deadline_s
                self._outputs.add(sequences, on_event, at, counted=counted)
            case _Cancel(request_id):
                self._outputs.cancel(request_id)
            case _Stop(request_id, index):
                self._outputs.stop(request_id, index)
            case EngineTask():
                self._tasks.add(message)

    @property
    def _late(self) -> str | None:
        """The request that came first, if its time is up."""
        request_id, until = next(iter(self._deadlines.items()), ("", float("inf")))
        return request_id if until < time.monotonic() else None

    def _end_late(self) -> None:
        """Requests whose time is up fail, wherever their sequences are."""
        while (request_id := self._late) is not None:
            del self._deadlines[request_id]
            late = DeadlineExceeded(f"The request took longer than {self._deadline_s:g} s.")
            self._outputs.fail(request_id, late)

    def _execute(self, chunks: Chunks) -> None:
        """One step, and those that follow from it: where the host is free while the device computes, each is begun
        before the tokens of the one before are known."""
        self.stats.sequences += self._outputs.admit(chunks)
        step = None
        while chunks:
            with self._busy():
                step = step or self._begin(chunks)
                ahead = self._schedule_ahead(chunks)
                following = self._begin(ahead, step) if ahead else None
                self._outputs.flush()
                try:
                    with self._long():
                        outputs = step.result()
                except Exception as error:
                    self._fail(chunks, error)
                    return
                self._process(chunks, outputs)
            chunks, step = ahead, following

    def _begin(self, chunks: Chunks, after: InFlightStep | None = None) -> InFlightStep:
        with self._long():
            return self._runner.execute_async(chunks, after)

    def _schedule_ahead(self, chunks: Chunks) -> Chunks:
        """The step to begin while these chunks are computed, with whoever has arrived by now: none where something is
        to be done between two steps."""
        if not self._runner.overlaps or self._down is not None:
            return ()
        self._receive(wait=False)
        self._end_late()
        if self._tasks or self._runner.graphs_due:
            return ()
        ahead = self._scheduler.schedule_ahead(chunks)
        self.stats.sequences += self._outputs.admit(ahead)
        return ahead

    def _process(self, chunks: Chunks, outputs: list[StepOutput]) -> None:
        self.stats.steps += 1
        self.stats.largest_batch = max(self.stats.largest_batch, len(chunks))
        self.stats.computed_tokens += sum(map(len, chunks))
        spoiled = [
            chunk.sequence for chunk, output in zip(chunks, outputs, strict=True)
            if chunk.sequence.block_table and not output.finite
        ]  # fmt: skip
        if spoiled:
            log.error("the logits of requests %s are not finite", unique_requests(spoiled))
            self._forget(spoiled, NotFinite("The model's output is not finite: there is no token and no score."))
        for chunk, output in zip(chunks, outputs, strict=True):
            if not chunk.sequence.block_table:
                continue  # it has ended: with the step before, or its request has failed with another sequence
            self._scheduler.postprocess(chunk, output.steered)
            self.stats.tokens += output.sampled is not None
            self.stats.scored_tokens += len(output.scored.logprobs) if output.scored else 0
            self._outputs.process(chunk, output)
        if not self._runner.overlaps:
            self._outputs.flush()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """While this lasts longer than `stall_s`, the engine is in trouble."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None
            self._runner.thread_scaler.ended()

    @contextmanager
    def _long(self) -> Iterator[None]:
        """Around what may take long, or never end, and touches no sequence: meanwhile `stop` may answer everybody."""
        self._computing = True
        try:
            yield
        finally:
            with self._lock:
                self._computing = False
                abandoned = self._abandoned
            if abandoned:
                raise _Abandoned

    def _fail(self, chunks: Chunks, error: Exception) -> None:
        """A failing step fails the requests in it, and those whose copies were not made, and nobody else, as long as
        the device still answers."""
        log.error("a step with %d sequences failed", len(chunks), exc_info=error)
        self.stats.failed_steps += 1
        blocks = self._runner.blocks
        uncopied = {copy.target for copy in blocks.pending_copies}
        touched = [chunk.sequence for chunk in chunks if chunk.sequence.block_table]
        touched += [one for one in self._scheduler.running if not uncopied.isdisjoint(one.block_table)]
        self._forget(touched, failure_of(error, "this request's batch"))
        # It may have written anywhere before it failed. Nobody wants the copies any more.
        blocks.reset_prefix_cache()
        blocks.pending_copies.clear()
        try:
            with self._long():
                self._runner.recover()
        except Exception as fatal:
            log.critical("the device does not answer any more", exc_info=fatal)
            self._fail_for_good(f"the device failed: {fatal}")

    def _forget(self, touched: list[Sequence], error: ServerError) -> None:
        """The rule for whatever a pass that failed, or was not finite, has touched, be it generated, scored or
        compared: its requests fail, what the pass computed is not committed, and what their blocks held before is found
        by nobody any more. So it is called before anything else of the pass is looked at, and before the next one."""
        for request_id in unique_requests(touched):
            self._outputs.fail(request_id, error, keep=False)

    # --- inside ---------------------------------------------------------------------------------

    def _submit(self, sequences: list[Sequence], on_event: EventSink, *, counted: bool) -> None:
        with self._lock:
            if self._down is not None or (counted and self._draining):
                raise EngineDown(f"The engine cannot take requests: {self._down or 'the server is shutting down'}.")
            if counted:
                if self._queued and self._queued + len(sequences) > self._queue_limit:
                    waiting = f"{self._queued} sequences are waiting already (limit {self._queue_limit})"
                    raise QueueFull(f"{waiting}; try again soon.")
                self._queued += len(sequences)
            self._inbox.put(_Submit(tuple(sequences), on_event, time.monotonic(), counted))

    def _scored(
        self, request_id: str, sequences: list[Sequence], result: Callable[[list[Scored]], T], *, counted: bool
    ) -> Future[T]:
        """Submits a request's sequences, whose continuations are given -> what `result` makes of their scores."""
        blocks = self._runner.blocks
        for sequence in sequences:
            wanted = sum(blocks.blocks_for(len(one.token_ids)) for one in sequence.lockstep)
            if wanted > blocks.num_blocks:
                raise PromptTooLong(
                    f"The prompt is too long: the text has {len(sequence.token_ids)} tokens; the cache has room for "
                    f"{blocks.num_tokens}"
                    + (
                        f", and {len(sequence.lockstep)} such texts are read at once."
                        if len(sequence.lockstep) > 1
                        else "."
                    )
                )
        future: TaskFuture[T] = TaskFuture(on_cancel=lambda: self.cancel(request_id))
        collector = ScoreCollector(len(sequences))

        def on_event(event: Event) -> None:
            found = collector.add(event)
            if isinstance(found, ServerError):
                future.settle(found)
            elif found is not None:
                try:
                    future.settle(result(found))
                except ServerError as error:
                    future.settle(error)

        if not sequences:
            future.settle(result([]))
        else:
            self._submit(sequences, on_event, counted=counted)
        return future

    def _dequeued(self, sequences: int) -> None:
        with self._lock:
            self._queued -= sequences

    def _request_ended(self, request_id: str) -> None:
        self._deadlines.pop(request_id, None)

    def _fail_for_good(self, why: str) -> None:
        self._close(why)
        self._failure = why

    def _close(self, why: str) -> None:
        with self._lock:
            self._down = self._down or why
        self._inbox.put(_Wake())

    def _shut(self) -> None:
        """Answer everything that is left. Nothing new can arrive: who submits looks at _down under the lock. On the
        engine's thread, or that of `stop` in its place."""
        while (message := self._poll()) is not None:
            self._take(message)
        why = EngineDown(f"The engine stopped: {self._down}.")
        self._outputs.clear(why)
        self._tasks.close(why)
