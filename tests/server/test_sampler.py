"""Every row is drawn by its own rules, and by nothing else."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.sampler import Sampler, uniforms
from server.engine.sequence import SamplingParams

CPU = torch.device("cpu")
VOCAB = 50
RULES = [
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.6),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.8),
    SamplingParams(temperature=2.0),
]
PROMPTS = [[1, 2, 3], [4], [5, 5], [1, 9, 30, 31], [0]]


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def processed(rule: SamplingParams, prompt: list[int], scores: torch.Tensor) -> torch.Tensor:
    """The distribution that transformers' own processors make, in the order of its generate()."""
    chain = LogitsProcessorList()
    if rule.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(rule.repetition_penalty))
    chain.append(TemperatureLogitsWarper(rule.temperature))
    if rule.top_k:
        chain.append(TopKLogitsWarper(rule.top_k))
    if rule.top_p < 1:
        chain.append(TopPLogitsWarper(rule.top_p))
    if rule.min_p:
        chain.append(MinPLogitsWarper(rule.min_p))
    result: torch.Tensor = chain(torch.tensor([prompt]), scores[None].clone()).softmax(-1)[0]
    return result


@pytest.mark.parametrize("index", range(len(RULES)))
def test_a_row_is_drawn_from_the_distribution_that_transformers_makes(index: int) -> None:
    draws, scores = 4000, logits(len(RULES))
    expected = processed(RULES[index], PROMPTS[index], scores[index])
    rules = [
        SamplingParams(**{**vars(rule), "choice": choice})
        for choice in range(draws)
        for rule in (RULES[index], RULES[0])
    ]
    prompts = [PROMPTS[index], PROMPTS[0]] * draws
    drawn = (
        Sampler(rules, VOCAB, CPU).sample(scores[[index, 0]].repeat(draws, 1), prompts, [0] * len(rules)).tokens[::2]
    )
    seen = torch.bincount(drawn, minlength=VOCAB) / draws
    assert not seen[expected == 0].any()
    assert (seen - expected).abs().max() < 0.03


def test_a_draw_does_not_depend_on_the_neighbours_nor_on_their_steps() -> None:
    together = Sampler(RULES, VOCAB, CPU)
    alone = [Sampler([rule], VOCAB, CPU) for rule in RULES]
    for step in range(50):
        scores, steps = logits(len(RULES), seed=step), [step + 3 * i for i in range(len(RULES))]
        tokens = together.sample(scores, PROMPTS, steps).tokens.tolist()
        assert tokens == [
            int(one.sample(scores[i : i + 1], PROMPTS[i : i + 1], steps[i : i + 1]).tokens)
            for i, one in enumerate(alone)
        ]


def test_temperature_zero_is_greedy_beside_rows_that_are_not() -> None:
    rules = [SamplingParams(temperature=0), SamplingParams(temperature=3), SamplingParams(temperature=1e-300)]
    scores = logits(3)
    tokens = Sampler(rules, VOCAB, CPU).sample(scores, [[0]] * 3, [0] * 3).tokens
    assert tokens[0] == scores[0].argmax()
    assert tokens[2] == scores[2].argmax()


def test_a_greedy_row_keeps_to_its_repetition_penalty() -> None:
    sampler = Sampler([SamplingParams(temperature=0, repetition_penalty=100.0)], VOCAB, CPU)
    scores, text = logits(1).abs(), [0]
    for step in range(10):
        text.append(int(sampler.sample(scores, [text], [step]).tokens))
    assert len(set(text[1:])) == 10


def test_the_random_numbers_are_uniform_and_their_own_for_each_seed_and_step() -> None:
    keys = torch.arange(1000)
    numbers = torch.cat([uniforms(keys, torch.full_like(keys, step)) for step in range(100)])
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    assert len(numbers.unique()) == len(numbers)
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(numbers.var()) == pytest.approx(1 / 12, abs=0.002)


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs for seed 0: 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [float(uniforms(torch.zeros(1, dtype=torch.int64), torch.tensor([step]))) for step in range(3)] == [
        (value >> 11) * 2.0**-53 for value in expected
    ]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_logits_that_are_no_numbers_give_a_token_all_the_same(value: float) -> None:
    drawn = Sampler(RULES, VOCAB, CPU).sample(torch.full((5, VOCAB), value), PROMPTS, [0] * 5)
    assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()
    assert not drawn.finite.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_one_logit_that_is_no_number_is_marked_and_no_other(value: float) -> None:
    scores = logits(len(RULES))
    scores[2, 7] = value
    scores[3, 7] = -float("inf")
    assert Sampler(RULES, VOCAB, CPU).sample(scores, PROMPTS, [0] * 5).finite.tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]
