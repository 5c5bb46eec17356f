"""Async scheduling: steps that are begun before the tokens of the one before are known give what they give alone."""

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from server.engine.sequence import SamplingParams, ScheduledChunk, Sequence, SteeringParams
from steering.types import SequenceSteering, Site
from tests.server.desk import Desk, sequence
from tests.server.test_architectures import VOCABULARY, columns, prefill_by_its_reference, tiny

STEM = tuple(range(3, 33))
RULES: list[dict[str, Any]] = [
    {},
    {"logprobs": 0},
    {"logprobs": 3, "top_k": 9},
    {"repetition_penalty": 1.6},
    {"presence_penalty": 1.5, "top_p": 0.8},
    {"frequency_penalty": 0.9, "repetition_penalty": 0.8, "logprobs": 1},
    {"min_tokens": 6, "stop_token_ids": tuple(range(0, VOCABULARY, 3))},
    {"stop_token_ids": tuple(range(0, VOCABULARY, 5)), "frequency_penalty": -0.7},
    {"logit_bias": ((5, 3.0),), "min_p": 0.05},
]
MIXES = (None, (1.0, 0.0), (-1.0, 1.5))


@dataclass(frozen=True)
class Ask:
    """A text: its prompt, its sampling parameters, the index of what steers it, and whether it is traced."""

    prompt: tuple[int, ...]
    params: SamplingParams
    mix: int
    trace: bool

    @classmethod
    def of(cls, number: random.Random) -> "Ask":
        own = tuple(number.randrange(3, VOCABULARY) for _ in range(number.randint(1, 12)))
        params = SamplingParams(
            max_new_tokens=number.randint(1, 14),
            temperature=number.choice((0.0, 1.0)),
            seed=number.randrange(100),
            **number.choice(RULES),
        )
        prompt = (*STEM[: number.choice((0, 4, 20, 30))], *own)
        return cls(prompt, params, number.randrange(len(MIXES)), number.random() < 0.2)


class Bench:
    columns = tuple(replace(one, site=Site.parse(f"{layer}.residual")) for layer, one in enumerate(columns("llama")))

    def __init__(self, **options: Any) -> None:
        self.desk = Desk(tiny("llama"), **options)
        handle = self.desk.bank.add(self.columns)
        self.steerings = [
            SteeringParams(SequenceSteering.of([(handle, mix)])) if mix else SteeringParams() for mix in MIXES
        ]

    def sequence(self, ask: Ask) -> Sequence:
        steering = self.steerings[ask.mix]
        return sequence(ask.prompt, sampling_params=ask.params, steering_params=steering, trace=ask.trace)

    def answer(self, one: Sequence) -> tuple[Any, list[float]]:
        """What must be the same, and numbers that must be nearly."""
        found = self.desk.finished[one]
        numbers: list[float] = []
        shown = []
        for token in found.tokens:
            top = token.logprob.top_token_ids if token.logprob else ()
            shown.append((token.token_id, token.logprob is None, top, [(t.attribute, t.site) for t in token.trace]))
            if token.logprob:
                numbers += [token.logprob.logprob, *token.logprob.top_logprobs]
            for each in token.trace:
                numbers += [each.gate, each.strength, each.delta_norm, each.cosine]
        return (found.token_ids, found.finish_reason, found.steered_tokens, shown), numbers


@cache
def alone(ask: Ask) -> tuple[Any, list[float]]:
    bench = clean()
    bench.desk.blocks.reset_prefix_cache()
    one = bench.sequence(ask)
    bench.desk.run([one])
    return bench.answer(one)


@cache
def clean() -> Bench:
    return Bench()


@pytest.mark.parametrize("steps", ["packed", "static", "static, with prompts"])
@settings(
    deadline=None,
    max_examples=3,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 10**6), num_blocks=st.sampled_from([16, 30, 100]))
def test_texts_logprobs_and_traces_are_those_of_each_alone(
    steps: str, seed: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random arrivals, prompts in chunks beside texts, penalties, log-probabilities, traces, ends that come early,
    shared beginnings, scores in between, in a cache that is sometimes too small."""
    number = random.Random(seed)
    if "prompts" in steps:
        prefill_by_its_reference(monkeypatch)
    graphs = "static" in steps
    bench = Bench(
        num_blocks=num_blocks, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, graphs=graphs, ahead=True
    )
    desk = bench.desk
    asks = [Ask.of(number) for _ in range(10)]
    asked = [bench.sequence(ask) for ask in asks]
    scores = [desk.engine.score([(STEM[:4], STEM[4:20])], bench.steerings[1], top=2) for _ in range(2)]
    desk.run(asked, arrivals=[number.randint(0, 30) for _ in asked])
    for ask, one in zip(asks, asked, strict=True):
        exact, numbers = alone(ask)
        found, close = bench.answer(one)
        assert found == exact, ask
        assert close == pytest.approx(numbers, rel=1e-3, abs=1e-4)
    first, second = (desk.finish(score) for score in scores)
    assert [one.logprob for one in first[0]] == pytest.approx([one.logprob for one in second[0]], rel=1e-3, abs=1e-4)
    assert desk.begun_ahead > 10


def test_a_crowd_with_every_rule_runs_ahead_from_its_first_step_to_its_last() -> None:
    """No step waits for a token: neither where prompts are read, nor where somebody arrives, ends or is counted."""
    bench = Bench(ahead=True, max_num_seqs=8, max_num_batched_tokens=12, num_blocks=200)
    desk, mixed = bench.desk, 0
    execute = desk.runner.execute_async

    def counted(chunks: tuple[ScheduledChunk, ...], *after: Any) -> Any:
        nonlocal mixed
        mixed += bool(after) and {1} < {len(chunk) for chunk in chunks}
        return execute(chunks, *after)

    desk.runner.execute_async = counted  # type: ignore[method-assign]
    asks = [
        Ask((40 + index, *STEM[: 3 + 2 * index]), SamplingParams(max_new_tokens=12, **rules), index % 3, index == 4)
        for index, rules in enumerate(RULES)
    ]
    asked = [bench.sequence(ask) for ask in asks]
    desk.run(asked, arrivals=[2 * index for index in range(len(asked))])
    assert [bench.answer(one)[0] for one in asked] == [alone(ask)[0] for ask in asks]
    assert len(desk.computed) - desk.begun_ahead == 1
    assert mixed > 3


def test_whoever_goes_away_is_let_go_while_a_step_is_computed() -> None:
    bench = Bench(ahead=True)
    desk = bench.desk
    stays, goes = (
        bench.sequence(Ask((5 + index, 6), SamplingParams(max_new_tokens=20, repetition_penalty=1.3), 1, False))
        for index in range(2)
    )
    desk.add(stays, goes)
    execute = desk.runner.execute_async

    def interrupted(chunks: tuple[ScheduledChunk, ...], *after: Any) -> Any:
        if len(desk.computed) == 5:
            desk.engine.cancel(goes.request_id)
        return execute(chunks, *after)

    desk.runner.execute_async = interrupted  # type: ignore[method-assign]
    for _ in range(2):  # what the last step gave is told in the next turn
        desk.step()
    assert desk.finished[goes].finish_reason == "cancelled"
    assert len(desk.finished[goes].token_ids) < 8
    assert len(desk.computed) - desk.begun_ahead == 1, "the other one's steps go on without a stop"
    ask = Ask(stays.prompt_token_ids, stays.sampling_params, 1, False)
    assert bench.answer(stays)[0] == alone(ask)[0]


def test_a_trace_tells_of_columns_whose_multiplier_is_0_as_well() -> None:
    bench = clean()
    one = bench.sequence(Ask((5, 6, 7), SamplingParams(max_new_tokens=2), mix=1, trace=True))
    bench.desk.run([one])
    for token in bench.desk.finished[one].tokens:
        multipliers = {(trace.attribute, trace.site): trace.strength / trace.gate for trace in token.trace}
        assert multipliers == pytest.approx({("kind", "0.residual"): 1.0, ("fair", "1.residual"): 0.0})
