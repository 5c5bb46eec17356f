"""What has become of each sequence: its text, when it ends, and the events that tell of it."""

import logging
import time
from collections.abc import Callable, Iterable

from server.engine.scheduler import Scheduler
from server.engine.sequence import (
    Event,
    EventSink,
    Failed,
    Finished,
    FinishReason,
    Progress,
    SampledToken,
    ScheduledChunk,
    Scored,
    ScoredTokens,
    Sequence,
    StepOutput,
    Timing,
    TokenEvent,
)
from server.engine.sequence_output import SequenceOutput
from server.engine.text_builder import Decoders
from server.errors import GenerationFailed, ServerError

log = logging.getLogger(__name__)


class OutputProcessor:
    """Sequences from their submission to their last event."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        decoders: Decoders | None,
        on_dequeued: Callable[[int], None],
        on_request_end: Callable[[str], None] = lambda request_id: None,
        on_flush: Callable[[], None] = lambda: None,
    ) -> None:
        """Without `decoders` no texts are made (`SequenceOutput`). `on_dequeued` is called with the number of sequences
        that left the queue (admitted, finished or failed), `on_request_end` with the id of a request that has no
        sequence left, `on_flush` when a step's events have been sent."""
        self._scheduler = scheduler
        self._eos = eos
        self._decoders = decoders
        self._on_dequeued = on_dequeued
        self._on_request_end = on_request_end
        self._on_flush = on_flush
        self._states: dict[Sequence, SequenceState] = {}
        self._left: dict[str, int] = {}  # of each request, the sequences that owe their last event
        self._unflushed: list[tuple[Sequence, SampledToken, FinishReason | None]] = []

    def __len__(self) -> int:
        """How many sequences still owe their last event."""
        return len(self._states)

    @property
    def num_scored(self) -> int:
        return sum(sequence.is_scored for sequence in list(self._states))

    def add(self, sequences: Iterable[Sequence], on_event: EventSink, submitted: float, *, counted: bool) -> None:
        """Registers sequences submitted at `submitted` (time.monotonic) and queues them; with `max_new_tokens` 0 they
        finish at once. `counted`: they count against the queue's limit."""
        sequences = list(sequences)
        for sequence in sequences:
            output = SequenceOutput(sequence, self._eos, self._decoders)
            self._states[sequence] = SequenceState(output, on_event, submitted, counted)
            self._left[sequence.request_id] = self._left.get(sequence.request_id, 0) + 1
        wanted = [one for one in sequences if one.is_scored or one.sampling_params.max_new_tokens]
        self._scheduler.add(wanted)
        for sequence in sequences:
            if not sequence.is_scored and not sequence.sampling_params.max_new_tokens:
                state = self._states[sequence]
                self._dequeue([state])
                self._end(state, state.finish("length"))

    def admit(self, chunks: Iterable[ScheduledChunk]) -> int:
        """Notes which sequences have their first step now; returns how many."""
        new = [state for chunk in chunks if (state := self._states[chunk.sequence]).admitted is None]
        self._dequeue(new)
        return len(new)

    def process(self, chunk: ScheduledChunk, output: StepOutput) -> None:
        """What a step gave a sequence. `flush` tells of it; a sequence that cannot go on fails its request only."""
        if output.sampled is not None:
            self._sampled(chunk.sequence, output.sampled)
        if output.scored is not None:
            self._scored(chunk.sequence, output.scored)

    def flush(self) -> None:
        """Sends the events of what has been processed since this was last called: texts, and who has ended."""
        unflushed, self._unflushed = self._unflushed, []
        for sequence, token, reason in unflushed:
            state = self._states.get(sequence)
            if state is None:
                continue  # its request has failed with a sequence before it
            try:
                finished = state.finish(reason) if reason else None
                event = state.token_event(token, last=finished is not None) if sequence.stream else None
            except Exception:
                self._cannot_decode(sequence)
                continue
            if event is not None:
                self._send(state, event)
            if finished is not None:
                self._end(state, finished)
        self._on_flush()

    def stop(self, request_id: str, index: int) -> None:
        """Ends one sequence of a request with what it has; one that has ended is left alone."""
        self.flush()
        for state in self._abort(request_id, index=index):
            self._end(state, state.finish("stop"))

    def cancel(self, request_id: str) -> None:
        """Ends every sequence of a request with what it has."""
        self.flush()
        for state in self._abort(request_id):
            sequence = state.sequence
            if sequence.is_scored:
                self._end(state, Failed(sequence, GenerationFailed("Nobody waits for this any more.")))
            else:
                self._end(state, state.finish("cancelled"))

    def fail(self, request_id: str, error: ServerError, *, keep: bool = True) -> None:
        """Fails every sequence of a request: its client gets no answer, whatever the others would have become. `keep`:
        what they computed is sound."""
        self.flush()
        for state in self._abort(request_id, keep=keep):
            self._end(state, Failed(state.sequence, error))

    def clear(self, error: ServerError) -> None:
        """Fails every sequence that there is."""
        self.flush()
        self._scheduler.clear()
        for state in list(self._states.values()):
            self._dequeue([state])
            self._end(state, Failed(state.sequence, error))
        self._on_flush()

    # --- inside ---------------------------------------------------------------------------------

    def _sampled(self, sequence: Sequence, token: SampledToken) -> None:
        sequence.token_ids.append(token.token_id)
        try:
            reason = self._states[sequence].accept(token)
        except Exception:
            self._cannot_decode(sequence)
            return
        self._unflushed.append((sequence, token, reason))
        if reason:
            self._scheduler.finish(sequence)

    def _scored(self, sequence: Sequence, scored: ScoredTokens) -> None:
        sequence.logprobs += scored.logprobs
        sequence.kl += scored.kl
        if not sequence.num_uncomputed:
            self._scheduler.finish(sequence)
            self._end(self._states[sequence], Scored(sequence, tuple(sequence.logprobs), sequence.kl))

    def _cannot_decode(self, sequence: Sequence) -> None:
        log.exception("the text of a sequence of request %s cannot be decoded", sequence.request_id)
        failure = GenerationFailed("The generated tokens could not be turned into text.")
        self.fail(sequence.request_id, failure)
        if state := self._states.get(sequence):  # it was not in the scheduler any more
            self._end(state, Failed(sequence, failure))

    def _abort(self, request_id: str, *, index: int | None = None, keep: bool = True) -> list["SequenceState"]:
        """Takes a request's sequences out, or that of an `index`, wherever they are; each still owes its last event."""
        aborted = self._scheduler.abort(request_id, index=index, keep=keep)
        states = [self._states[sequence] for sequence in aborted]
        self._dequeue(states)
        return states

    def _dequeue(self, states: Iterable["SequenceState"]) -> None:
        now, counted = time.monotonic(), 0
        for state in states:
            if state.admitted is None:
                state.admitted = now
                counted += state.counted
        if counted:
            self._on_dequeued(counted)

    def _end(self, state: "SequenceState", event: Finished | Scored | Failed) -> None:
        sequence = state.sequence
        del self._states[sequence]
        self._send(state, event)
        self._left[sequence.request_id] -= 1
        if not self._left[sequence.request_id]:
            del self._left[sequence.request_id]
            self._on_request_end(sequence.request_id)

    @staticmethod
    def _send(state: "SequenceState", event: Event) -> None:
        try:
            state.on_event(event)
        except Exception:  # a sink whose event loop has closed must not take the engine down
            log.exception("nobody took an event of request %s", state.sequence.request_id)


class SequenceState:
    """One sequence's output and times."""

    def __init__(self, output: SequenceOutput, on_event: EventSink, submitted: float, counted: bool) -> None:
        """`counted`: the sequence counts against the queue's limit while it waits."""
        self.sequence = output.sequence
        self.output = output
        self.on_event = on_event
        self.counted = counted
        self.admitted: float | None = None  # when its first step ran, or it left the queue in another way
        self._submitted = submitted
        self._first: float | None = None
        self._counts: list[int] = []  # the sequence's counts of steered tokens, of which `_counted` have been added up
        self._counted = self._steered = 0

    def accept(self, token: SampledToken) -> FinishReason | None:
        """Takes one step's token; returns why the sequence ends, or None while it goes on."""
        self._first = time.monotonic() if self._first is None else self._first
        return self.output.accept(token)

    def finish(self, reason: FinishReason) -> Finished:
        """The sequence's last event."""
        return self.output.finish(reason, self._steered_tokens(), self._timing())

    def token_event(self, token: SampledToken, *, last: bool) -> TokenEvent:
        """What the token that was accepted adds to the text that is certain."""
        progress = Progress(self._steered_tokens(), self._timing()) if self.output.needs_reader else None
        return self.output.token_event(token, last=last, progress=progress)

    def _steered_tokens(self) -> int:
        """Adds up what is new; everything anew where the sequence was preempted, and its counts are another list."""
        if self._counts is not self.sequence.steered:
            self._counts, self._counted, self._steered = self.sequence.steered, 0, 0
        self._steered += sum(self._counts[self._counted :])
        self._counted = len(self._counts)
        return self._steered

    def _timing(self) -> Timing:
        now = time.monotonic()

        def since(moment: float | None) -> float:
            return round(((now if moment is None else moment) - self._submitted) * 1000, 3)

        return Timing(queue_ms=since(self.admitted), ttft_ms=since(self._first), total_ms=since(now))
