"""Requests to an engine, and when their tokens came."""

import itertools
import queue
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.contenders import Ours
from benchmarks.workload import SHAPES, Request
from server.engine.sequence import Event, Finished, TokenEvent


@dataclass(frozen=True)
class Streamed:
    """Seconds: of the whole run, when each request was sent, from there to its first token, and between its tokens."""

    seconds: float
    asked: list[float]
    first: list[float]
    gaps: list[float]
    tokens: int


def prompts(shape: str, count: int, length: int, new: int, seed: int = 0) -> list[Request]:
    """Random ones, all of one length."""
    number, vocab = random.Random(seed), SHAPES[shape]["vocab_size"]
    return [Request(tuple(number.choices(range(vocab), k=length)), new) for _ in range(count)]


def step_seconds(ours: Ours, work: Sequence[Request]) -> float:
    """Of a step that decodes all of the requests, which have equally many new tokens. Their prompts have been read
    before, by a call of this function: so all of them begin in one step."""
    return _step_seconds(ours.answers(work, keep=True), work[0].new)


def _step_seconds(answers: Sequence[Finished], new: int) -> float:
    begun = max(one.timing.ttft_ms for one in answers)
    ended = max(one.timing.total_ms for one in answers)
    return (ended - begun) / 1000 / (new - 1)


def step_beside(ours: Ours, work: Sequence[Request], chunks: Sequence[Request]) -> tuple[float, float]:
    """The same while the `chunks` are read one after the other, as many prompts of one new token as `work` has steps;
    and the share of the steps that read one."""
    left = iter(chunks)
    told: list[Event] = []
    over: queue.SimpleQueue[None] = queue.SimpleQueue()

    def read_next(event: Event | None = None) -> None:
        """On the engine's thread: no step waits for another one."""
        if len(told) < len(work):
            ours.engine.submit([ours.sequence(len(work), next(left))], read_next)
        else:
            over.put(None)

    ours.engine.submit([ours.sequence(index, one) for index, one in enumerate(work)], told.append)
    read_next()
    over.get()
    answers = [event for event in told if isinstance(event, Finished)]
    assert len(answers) == len(work), told
    read = len(chunks) - len([*left]) - 1  # the first and the last one may be read before and after
    return _step_seconds(answers, work[0].new), read / (work[0].new - 1)


def median_step(ours: Ours, work: Sequence[Request], rounds: int) -> float:
    """The same, a median. The first call reads the prompts, and what is made at a first call."""
    ours.blocks.reset_prefix_cache()
    return statistics.median([step_seconds(ours, work) for _ in range(1 + rounds)][1:])


def in_turn(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Medians of both, and of the second's share of the first, round by round. The first round warms up."""
    pairs = [(first(), second()) for _ in range(1 + rounds)][1:]
    ones, others = zip(*pairs, strict=True)
    return statistics.median(ones), statistics.median(others), statistics.median(b / a for a, b in pairs)


def streamed(
    ours: Ours, work: Sequence[Request], *, clients: int | None = None, rate: float | None = None, lead: float = 0.0
) -> Streamed:
    """Closed loop: so many `clients` (None: one for each request), each with its next request when its last is
    answered. Open loop: the requests come at random times, `rate` a second on average. `lead`: seconds by which the
    first one comes before the others."""
    number = random.Random(0)
    ours.blocks.reset_prefix_cache()
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()
    asked = [0.0] * len(work)
    times: list[list[float]] = [[] for _ in work]

    def on_event(event: Event) -> None:
        if isinstance(event, TokenEvent):
            times[event.sequence.index].append(time.perf_counter())
        else:
            ended.put(event)

    def ask(index: int) -> None:
        asked[index] = time.perf_counter()
        ours.engine.submit([ours.sequence(index, work[index], stream=True)], on_event)

    start = due = time.perf_counter()
    at_once = len(work) if rate is not None else min(clients or len(work), len(work))
    for index in range(at_once):
        if rate is not None:
            time.sleep(max(0.0, due - time.perf_counter()))
            due += number.expovariate(rate)
        ask(index)
        if index == 0:
            time.sleep(lead)
    for following in range(at_once, at_once + len(work)):
        event = ended.get()
        assert isinstance(event, Finished), event
        if following < len(work):
            ask(following)
    return Streamed(
        time.perf_counter() - start,
        [at - start for at in asked],
        [came[0] - asked[index] for index, came in enumerate(times)],
        [after - before for came in times for before, after in itertools.pairwise(came)],
        sum(map(len, times)),
    )
