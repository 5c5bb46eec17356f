"""What has become of each sequence: its text, when it ends, and the events that tell of it."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import cache

from server.engine.scheduler import Scheduler
from server.engine.sequence import (
    Event,
    EventSink,
    Failed,
    Finished,
    FinishReason,
    SampledToken,
    ScheduledChunk,
    Scored,
    ScoredTokens,
    Sequence,
    StepOutput,
    Timing,
    TokenEvent,
)
from server.engine.text_builder import Decoders, TextBuilder
from server.errors import GenerationFailed, ServerError
from server.tokenizer import Decode

log = logging.getLogger(__name__)


class OutputProcessor:
    """Sequences from their submission to their last event."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        decode: Decode,
        decode_all: Decode | None = None,
        on_dequeued: Callable[[int], None],
        on_request_end: Callable[[str], None] = lambda request_id: None,
    ) -> None:
        """`decode`: the text of token ids, `decode_all`: with special tokens; None: there are none. `on_dequeued` is
        called with the number of sequences that left the queue (admitted, finished or failed), `on_request_end` with
        the id of a request that has no sequence left."""
        every = decode_all or decode
        self._scheduler = scheduler
        self._eos = eos
        self._decoders = Decoders(decode, every, cache(lambda token: decode([token]) != every([token])))
        self._on_dequeued = on_dequeued
        self._on_request_end = on_request_end
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
            self._states[sequence] = SequenceState(sequence, on_event, submitted, counted, self._eos, self._decoders)
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

    def _abort(self, request_id: str, *, keep: bool = True) -> list["SequenceState"]:
        """Takes a request's sequences out, wherever they are; each still owes its last event."""
        states = [self._states[sequence] for sequence in self._scheduler.abort(request_id, keep=keep)]
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
    """One sequence's tokens, text and times, until an end-of-text token, a stop string, the length or a
    cancellation ends it."""

    def __init__(
        self,
        sequence: Sequence,
        on_event: EventSink,
        submitted: float,
        counted: bool,
        eos: frozenset[int],
        decoders: Decoders,
    ) -> None:
        """`counted`: the sequence counts against the queue's limit while it waits."""
        sampling = sequence.sampling_params
        self.sequence = sequence
        self.on_event = on_event
        self.counted = counted
        self.admitted: float | None = None  # when its first step ran, or it left the queue in another way
        self._submitted = submitted
        self._first: float | None = None
        sequence.end_token_ids = (frozenset() if sampling.ignore_eos else eos) | set(sampling.stop_token_ids)
        self._text = TextBuilder(decoders, sequence.prompt_token_ids, sampling)
        self._token_ids: list[int] = []
        self._tokens: list[SampledToken] = []
        self._sent = 0  # characters of the text that token events have sent

    def accept(self, token: SampledToken) -> FinishReason | None:
        """Takes one step's token; returns why the sequence ends, or None while it goes on."""
        self._first = time.monotonic() if self._first is None else self._first
        sampling = self.sequence.sampling_params
        self._token_ids.append(token.token_id)
        if sampling.logprobs is not None or self.sequence.trace:
            self._tokens.append(token)
        if token.token_id in self.sequence.end_token_ids:
            self._text.end(token.token_id)
            return "stop"
        self._text.push(token.token_id)
        if sampling.stop and self._read_and_check_stop():
            return "stop"
        return "length" if len(self._token_ids) >= sampling.max_new_tokens else None

    def finish(self, reason: FinishReason) -> Finished:
        """The sequence's last event."""
        if self._read_and_check_stop(final=True) and reason == "length":
            reason = "stop"
        return Finished(
            sequence=self.sequence,
            token_ids=tuple(self._token_ids),
            text=self._text.text,
            finish_reason=reason,
            steered_tokens=sum(self.sequence.steered),
            timing=self._timing(),
            tokens=tuple(self._tokens),
        )

    def token_event(self, token: SampledToken, *, last: bool) -> TokenEvent:
        """What the token that was accepted adds to the text that is certain."""
        if not self.sequence.sampling_params.stop and not last:
            self._read_and_check_stop()
        certain = len(self._text.text) if last else self._text.certain
        text, self._sent = self._text.text[self._sent : certain], max(self._sent, certain)
        return TokenEvent(self.sequence, len(self._token_ids) - 1, token, text)

    def _read_and_check_stop(self, *, final: bool = False) -> bool:
        """Takes in the text that has become certain; returns whether a stop string has ended it."""
        return self._text.read(final=final, stops=len(self._token_ids) >= self.sequence.sampling_params.min_tokens)

    def _timing(self) -> Timing:
        now = time.monotonic()

        def since(moment: float | None) -> float:
            return round(((now if moment is None else moment) - self._submitted) * 1000, 3)

        return Timing(queue_ms=since(self.admitted), ttft_ms=since(self._first), total_ms=since(now))
