"""Whatever fails, and whenever: who is answered is answered as if nothing had failed, and nothing false stays."""

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from server.engine import model_runner
from server.engine.divergence import Divergence
from server.engine.model_runner import HostCopy
from server.engine.scoring import ComparisonPair
from server.engine.sequence import Event, Failed, Finished, SamplingParams, ScheduledChunk, Sequence, SteeringParams
from server.errors import GenerationFailed, NotFinite, OutOfMemory, ServerError
from steering.types import SequenceSteering
from tests.server.conftest import World, columns, tiny_llama
from tests.server.desk import NAMES, Desk

Tokens = tuple[int, ...]
STEM = tuple(range(40, 70))
MIXES = ((0.0, 0.0, 0.0), (1.5, 0.0, -1.0))


@dataclass(frozen=True)
class Work:
    """A request: greedy texts of a prompt, or scores or a comparison of continuations."""

    kind: str
    prompt: Tokens
    texts: tuple[Tokens, ...]  # for "generate" only their lengths matter
    mix: int

    def on(self, bench: "Bench", got: "Got") -> None:
        """Submits it."""
        steering = bench.steerings[self.mix]
        if self.kind == "generate":
            bench.generate(self, steering, got)
        elif self.kind == "compare":
            pair = ComparisonPair(self.prompt, *self.texts, steering)
            got.waits_for(bench.desk.engine.compare(pair), _numbers_of_divergence)
        else:
            texts = [(self.prompt, text) for text in self.texts]
            got.waits_for(bench.desk.engine.score(texts, steering, 2), _numbers_of_scores)


@dataclass
class Got:
    """What came of it."""

    answer: Any = None
    error: ServerError | None = None
    left: int = 1
    cancel: Callable[[], Any] = lambda: None
    texts: dict[int, Tokens] = field(default_factory=dict)

    def waits_for(self, future: "Future[Any]", numbers: Callable[[Any], Any]) -> None:
        def settled(future: "Future[Any]") -> None:
            self.left = 0
            if future.cancelled():
                return
            if error := future.exception():
                assert isinstance(error, ServerError)
                self.error = error
            else:
                self.answer = numbers(future.result())

        self.cancel = future.cancel
        future.add_done_callback(settled)


def _numbers_of_divergence(found: Divergence) -> Any:
    return [found.kl_per_token, found.logprob_under_baseline, found.perplexity_ratio]


def _numbers_of_scores(found: Any) -> Any:
    return [one.logprob for each in found for one in each]


class Bench:
    """An engine, and how often what it does goes wrong."""

    def __init__(self, *, num_blocks: int, ahead: bool = False) -> None:
        self.desk = Desk(tiny_llama(320), num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=24, ahead=ahead)
        self.steerings = [
            SteeringParams(SequenceSteering.of([(handle, mix)]))
            for mix, handle in zip(MIXES, [self.desk.bank.add(columns(32, seed=1))] * len(MIXES), strict=True)
        ]
        self.number = random.Random(0)
        self.rate = 0.0
        self.faults: list[str] = []
        runner = self.desk.runner
        self._forward, self._copy = runner.forward, runner.attention.copy
        runner.forward = self.forward  # type: ignore[method-assign]
        runner.attention.copy = self.copy  # type: ignore[method-assign]

    def generate(self, work: Work, steering: SteeringParams, got: Got) -> None:
        name = f"work-{next(NAMES)}"
        sampling = [SamplingParams(max_new_tokens=len(text), temperature=0) for text in work.texts]
        got.left, got.cancel = len(sampling), lambda: self.desk.engine.cancel(name)

        def take(event: Event) -> None:
            if isinstance(event, Failed):
                got.error = event.error
            elif isinstance(event, Finished):
                got.texts[event.sequence.index] = event.token_ids
            got.left -= 1
            if not got.left and got.error is None:
                got.answer = [got.texts[index] for index in range(len(sampling))]

        sequences = [Sequence(name, index, work.prompt, one, steering) for index, one in enumerate(sampling)]
        self.desk.engine.submit(sequences, take)

    def goes_wrong(self, what: str) -> bool:
        wrong = self.number.random() < self.rate
        self.faults += [what] * wrong
        return wrong

    def copy(self, copies: Any) -> None:
        if copies and self.goes_wrong("copy"):
            self._copy(copies[: self.number.randrange(len(copies))])
            raise RuntimeError("out of memory")
        self._copy(copies)

    def forward(self, chunks: tuple[ScheduledChunk, ...], *ids: Any) -> Any:
        if self.goes_wrong("pass"):
            for chunk in chunks:
                self._write(chunk, self.number.uniform(-3, 3))
            raise RuntimeError("out of memory")
        logits, counts = self._forward(chunks, *ids)
        if self.goes_wrong("not finite"):
            broken, first = self.number.choice(chunks), 0
            for chunk in chunks:
                if chunk is broken:
                    self._write(chunk, torch.nan)
                    with torch.inference_mode():
                        logits[first : first + chunk.num_rows] = self.number.choice([torch.nan, torch.inf])
                first += chunk.num_rows
        return logits, counts

    def score_chunks(self, real: Any, logits: Any) -> Any:
        if self.goes_wrong("score"):
            raise RuntimeError("out of memory")
        return real(logits)

    def _write(self, chunk: ScheduledChunk, what: float) -> None:
        """What a broken pass leaves behind for the chunk's tokens."""
        size = self.desk.blocks.block_size
        for token in range(chunk.start, chunk.end):
            for pool in self.desk.runner.attention.pools.values():
                for cache_ in (pool.keys, pool.values):
                    cache_[chunk.sequence.block_table[token // size], :, token % size] = what

    def answer(self, work: Work) -> Any:
        got = Got()
        work.on(self, got)
        while got.left:
            self.desk.step()
        assert got.error is None, got.error
        return got.answer


@cache
def clean() -> Bench:
    """Where nothing fails, and there is room for everything."""
    return Bench(num_blocks=64)


@cache
def expected(work: Work) -> Any:
    clean().desk.blocks.reset_prefix_cache()
    answer = clean().answer(work)
    return answer if work.kind == "generate" else pytest.approx(answer, rel=1e-3, abs=1e-4)


def some_work(number: random.Random) -> Work:
    def some(least: int, most: int) -> Tokens:
        return tuple(number.randrange(40, 44) for _ in range(number.randint(least, most)))

    kind = number.choice(["generate", "generate", "score", "compare"])
    prompt = (*STEM[: number.randint(1, 30)], *some(0, 3))
    texts = some(1, 12), some(1, 12)
    return Work(kind, prompt, texts if kind == "compare" else texts[: number.randint(1, 2)], number.randrange(2))


@pytest.mark.parametrize("ahead", [False, True])
@settings(
    deadline=None,
    max_examples=5,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a smaller seed is no simpler story
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 10**6), num_blocks=st.integers(12, 24), rate=st.sampled_from([0.03, 0.15]))
def test_what_has_failed_changes_no_later_answer(ahead: bool, seed: int, num_blocks: int, rate: float) -> None:
    """Copies, passes and scores that fail, and logits that are no numbers, at random points of random work in a cache
    that is often too small, some of it cancelled."""
    bench, number = Bench(num_blocks=num_blocks, ahead=ahead), random.Random(seed)
    bench.number, bench.rate = random.Random(seed + 1), rate
    desk, engine = bench.desk, bench.desk.engine
    real = model_runner.score_chunks
    asked: list[tuple[Work, Got]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "score_chunks", lambda logits: bench.score_chunks(real, logits))
        while len(asked) < 12 or any(got.left for _, got in asked):
            if len(asked) < 12 and number.random() < 0.4:
                asked.append((some_work(number), Got()))
                asked[-1][0].on(bench, asked[-1][1])
            if asked and number.random() < 0.03:
                work, got = number.choice(asked)
                got.cancel()
                asked = [one for one in asked if one[1] is not got]
            desk.step()
        bench.rate = 0.0
        for work, got in asked:
            if got.error is None:
                assert got.answer == expected(work)
            else:
                assert bench.faults
                assert isinstance(got.error, GenerationFailed | NotFinite)
        while not desk.scheduler.idle:
            desk.step()
        for work, _ in asked:
            assert bench.answer(work) == expected(work), "a fault has left something behind"
    desk.step()
    assert not desk.blocks.pending_copies
    assert not engine.open_sequences
    assert not engine._queued
    assert not engine._deadlines
    assert not engine._outputs._left
    assert not desk.scheduler._waiting._clients


def test_a_part_of_a_prompt_that_is_not_finite_is_known_at_once() -> None:
    """Nobody can find it, though its request would have been cancelled before it samples anything."""
    bench, got = Bench(num_blocks=16), Got()
    work = Work("generate", tuple(range(40, 80)), ((1,) * 3,), 0)
    bench.goes_wrong = lambda what: what == "not finite"  # type: ignore[method-assign]
    work.on(bench, got)
    bench.desk.step()
    assert isinstance(got.error, NotFinite)
    assert bench.desk.computed == [24], "the first part of it"
    bench.goes_wrong = lambda what: False  # type: ignore[method-assign]
    assert bench.answer(work) == expected(work)


@pytest.mark.parametrize("ahead", [False, True])
def test_after_a_lack_of_memory_nothing_is_found_in_the_cache_and_no_block_is_held(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told when the step's numbers are asked for: the next step may have been begun by then."""
    bench = Bench(num_blocks=24, ahead=ahead)
    blocks, runner = bench.desk.blocks, bench.desk.runner
    idle, *works = (Work("generate", STEM[first:], ((1,) * 8,), first % 2) for first in (0, 10, 15))
    for work in (idle, *works):
        assert bench.answer(work) == expected(work)
    cached = blocks.cached_tokens
    assert bench.answer(idle) == expected(idle)
    assert blocks.cached_tokens > cached
    real, begun, recovered = HostCopy.arrays, len(bench.desk.computed), []

    def arrays(copy: HostCopy) -> Any:
        if len(bench.desk.computed) < begun + 4:
            return real(copy)
        monkeypatch.setattr(HostCopy, "arrays", real)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(HostCopy, "arrays", arrays)
    monkeypatch.setattr(runner, "recover", lambda: recovered.append(type(runner).recover(runner)))
    all_got = [Got() for _ in works]
    for work, got in zip(works, all_got, strict=True):
        work.on(bench, got)
    while any(got.left for got in all_got):
        bench.desk.step()
    assert all(isinstance(got.error, OutOfMemory) for got in all_got)
    assert bench.desk.engine.stats.failed_steps == len(recovered) == 1
    assert (bench.desk.begun_ahead > 0) == ahead
    assert blocks.num_free_blocks == blocks.num_blocks
    cached = blocks.cached_tokens
    for work in (idle, *works):
        assert bench.answer(work) == expected(work)
    assert blocks.cached_tokens == cached, "what the failed step may have written over is not found"


TURNS = [{"role": "user", "content": "What colour is the sky?"}]
PROMPT = "Q: What colour is grass? A:"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": PROMPT, "max_new_tokens": 4}),
        ("/generate", {"messages": TURNS, "max_new_tokens": 4, "baseline": True, "trace": True}),
        ("/compare", {"prompt": PROMPT, "arms": [{"name": "a", "attributes": {}}, {"name": "b"}], "max_new_tokens": 4}),
        ("/score", {"prompt": PROMPT, "continuations": [" Grass is green.", " No."]}),
        ("/v1/completions", {"model": "demo", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}),
        ("/v1/chat/completions", {"model": "demo", "messages": TURNS, "max_tokens": 4}),
        ("/v1/responses", {"model": "demo", "input": PROMPT, "max_output_tokens": 4}),
    ],
)
def test_no_route_answers_with_what_is_not_finite_or_remembers_it(fresh: World, path: str, body: Any) -> None:
    runner = fresh.service.engine._runner
    forward = runner.forward

    def without_a_number(*given: Any) -> Any:
        logits, counts = forward(*given)
        return torch.full_like(logits, torch.nan), counts

    runner.forward = without_a_number  # type: ignore[method-assign]
    failed = fresh.client.post(path, json=body)
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "not_finite")
    if path != "/score":
        assert '"not_finite"' in fresh.client.post(path, json={**body, "stream": True}).text
    runner.forward = forward  # type: ignore[method-assign]
    assert fresh.client.post(path, json=body).status_code == 200
    assert fresh.service.engine.status.used_blocks == 0
    assert fresh.service.registry.pins == 0
