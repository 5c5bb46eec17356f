"""Every row is drawn by its own rules, and by nothing else."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.sampler import PenalisedText, Sampler, SamplerOutput, TokenCounts, uniforms
from server.engine.sequence import SamplingParams

CPU = torch.device("cpu")
VOCAB = 50
RULES = [
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.6),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.8),
    SamplingParams(temperature=2.0),
    SamplingParams(presence_penalty=1.7),
    SamplingParams(frequency_penalty=0.9),
    SamplingParams(presence_penalty=-0.6, frequency_penalty=-0.4, temperature=1.2),
    SamplingParams(logit_bias=((3, 4.0), (8, -100.0), (30, -2.5))),
    SamplingParams(min_tokens=3),
    SamplingParams(
        min_tokens=9,
        logit_bias=((0, 5.0), (12, 5.0)),
        repetition_penalty=1.4,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        temperature=1.1,
        top_k=30,
        top_p=0.95,
        min_p=0.01,
    ),
]
# What each row has had; the last `STEPS` tokens of it have been sampled.
PROMPTS = [[1, 2, 3], [4], [5, 5], [1, 9, 30, 31], [0], *[[1, 9, 9, 9, 30, 31, 30, 12] for _ in range(6)]]
STEPS = [0, 0, 0, 0, 0, 5, 5, 5, 5, 2, 6]
ENDS = [frozenset({0, 12, 40})] * len(RULES)


def texts_of(rules: list[SamplingParams], texts: list[list[int]], steps: list[int]) -> TokenCounts:
    """Of the rows that are penalised."""
    counts = TokenCounts(VOCAB, CPU)
    counts.hold(
        {
            row: PenalisedText(text, tuple(text[: len(text) - step]), len(text))
            for row, (rule, text, step) in enumerate(zip(rules, texts, steps, strict=True))
            if rule.is_penalised
        }
    )
    return counts


def sample(
    rules: list[SamplingParams],
    scores: torch.Tensor,
    texts: list[list[int]],
    steps: list[int],
    ends: Any = (),
) -> SamplerOutput:
    """`texts`: what each row has had, of which `steps` tokens have been sampled."""
    return Sampler(rules, VOCAB, CPU, ends).sample(scores, steps, texts_of(rules, texts, steps))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


class OpenAIPenalties(LogitsProcessor):
    """The formula of OpenAI's API reference, in float64: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""

    def __init__(self, rule: SamplingParams, generated: list[int]) -> None:
        self._rule, self._counts = rule, Counter(generated)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.double()
        for token, count in self._counts.items():
            scores[:, token] -= count * self._rule.frequency_penalty + (count > 0) * self._rule.presence_penalty
        return scores


def processed(rule: SamplingParams, prompt: list[int], scores: torch.Tensor, step: int = 0) -> torch.Tensor:
    """The distribution that transformers' own processors make, in the order of its generate()."""
    chain = LogitsProcessorList()
    if rule.min_tokens:
        ends = sorted(ENDS[0])
        chain.append(MinNewTokensLengthLogitsProcessor(len(prompt) - step, rule.min_tokens, ends, device="cpu"))
    if rule.logit_bias:
        chain.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in rule.logit_bias}))
    if rule.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(rule.repetition_penalty))
    chain.append(OpenAIPenalties(rule, prompt[len(prompt) - step :]))
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
    expected = processed(RULES[index], PROMPTS[index], scores[index], STEPS[index])
    rules = [
        SamplingParams(**{**vars(rule), "choice": choice})
        for choice in range(draws)
        for rule in (RULES[index], RULES[0])
    ]
    prompts = [PROMPTS[index], PROMPTS[0]] * draws
    steps = [STEPS[index], STEPS[0]] * draws
    repeated = scores[[index, 0]].repeat(draws, 1)
    drawn = sample(rules, repeated, prompts, steps, ENDS[:1] * len(rules)).tokens[::2]
    seen = torch.bincount(drawn, minlength=VOCAB) / draws
    assert not seen[expected == 0].any()
    assert (seen - expected).abs().max() < 0.03


def test_a_draw_does_not_depend_on_the_neighbours_nor_on_their_steps() -> None:
    texts = [list(prompt) for prompt in PROMPTS]
    for step in range(50):
        scores, steps = logits(len(RULES), seed=step), [step + own for own in STEPS]
        tokens = sample(RULES, scores, texts, steps, ENDS).tokens.tolist()
        assert tokens == [
            int(sample([rule], scores[i : i + 1], texts[i : i + 1], steps[i : i + 1], ENDS[:1]).tokens)
            for i, rule in enumerate(RULES)
        ]
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)


def test_a_row_that_asks_for_nothing_keeps_its_token_whatever_its_neighbours_ask() -> None:
    plain = SamplingParams(temperature=1.4, seed=3)
    scores, steps = logits(1).repeat(len(RULES) + 1, 1), [0, *STEPS]
    alone = sample([plain], scores[:1], [[2]], [0])
    beside = sample([plain, *RULES], scores, [[2], *PROMPTS], steps, [frozenset(), *ENDS])
    assert beside.tokens[0] == alone.tokens[0]


def test_a_batch_that_asks_for_none_of_them_pays_for_none() -> None:
    scores = logits(2)
    plain = Sampler([SamplingParams(), SamplingParams(temperature=0, top_k=3)], VOCAB, CPU, ENDS[:2])
    assert plain._adjusted(scores, [0, 0], None) is scores
    asking = Sampler([SamplingParams(), SamplingParams(logit_bias=((1, 2.0),))], VOCAB, CPU, ENDS[:2])
    adjusted = asking._adjusted(scores, [0, 0], None)
    assert torch.equal(adjusted[0], scores[0])
    assert (adjusted - scores).nonzero().tolist() == [[1, 1]]


def kept_by_sorting(scores: torch.Tensor, rule: SamplingParams) -> list[int]:
    """What top_k and top_p leave of one row: all tokens are put in order, of equal ones the first come first."""
    order = sorted(range(len(scores)), key=lambda token: (-float(scores[token]), token))
    kth = float(scores[order[min(rule.top_k or VOCAB, VOCAB) - 1]])
    left = [token for token in order if float(scores[token]) >= kth]
    chances = torch.tensor([float(scores[token]) for token in left], dtype=torch.float64).softmax(-1)
    before = (chances.cumsum(-1) - chances).tolist()
    return sorted(
        token
        for place, (token, mass) in enumerate(zip(left, before, strict=True))
        if not place or mass < rule.top_p or rule.top_p == 1
    )


@pytest.mark.parametrize("step", [None, 1.0, 0.25], ids=["no ties", "many ties", "some ties"])
def test_what_is_excluded_is_what_a_sort_of_all_tokens_excludes(step: float | None) -> None:
    """Logits of few bits have ties, also at the border."""
    rules = [
        SamplingParams(top_k=top_k, top_p=top_p)
        for top_k in (0, 1, 3, 10, VOCAB - 1, VOCAB, 9 * VOCAB)
        for top_p in (1e-6, 0.3, 0.5, 0.83, 0.999, 1.0)
    ]
    for seed in range(8):
        scores = logits(len(rules), seed)
        if step:
            scores = (scores / step).round() * step
        left = Sampler(rules, VOCAB, CPU)._restrict(scores.clone())
        for row, rule in enumerate(rules):
            kept = kept_by_sorting(scores[row], rule)
            assert left[row].isfinite().nonzero()[:, 0].tolist() == kept, rule
            assert torch.equal(left[row][kept], scores[row][kept])


def test_no_more_tokens_are_put_in_order_than_a_row_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    ordered: list[tuple[int, int]] = []
    real_topk, real_sort = torch.Tensor.topk, torch.Tensor.sort

    def topk(scores: torch.Tensor, k: int, **more: Any) -> Any:
        ordered.append((len(scores), k))
        return real_topk(scores, k, **more)

    def sort(scores: torch.Tensor, **more: Any) -> Any:
        ordered.append(tuple(scores.shape))
        return real_sort(scores, **more)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    monkeypatch.setattr(torch.Tensor, "sort", sort)
    plain = [SamplingParams(), SamplingParams(min_p=0.1), SamplingParams(temperature=0, top_k=4, top_p=0.5)]
    sample(plain, logits(3), [[0]] * 3, [0] * 3)
    assert not ordered
    rules = [*plain, SamplingParams(top_k=7, top_p=0.9), SamplingParams(top_k=3), SamplingParams(top_p=0.9)]
    sample(rules, logits(6), [[0]] * 6, [0] * 6)
    assert ordered == [(2, 7)], "top_p alone puts none in order"


@pytest.mark.parametrize("top_p", [1e-30, 0.1, 0.7, 0.999])
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 30.0, 1e30])
def test_of_any_logits_the_first_that_reach_top_p_are_left(size: float, top_p: float) -> None:
    """Also of a large vocabulary, of which most are banned, or all equally likely."""
    vocab = 3000
    scores = size * torch.randn(4, vocab, generator=torch.Generator().manual_seed(1))
    scores[1] = size
    scores[2, torch.randperm(vocab)[:2900]] = -torch.inf
    scores[3] = torch.arange(vocab) % 7 * size
    left = Sampler([SamplingParams(top_p=top_p)] * 4, vocab, CPU)._restrict(scores.clone())
    for row in range(4):
        order = scores[row].sort(descending=True, stable=True).indices
        chances = scores[row].double().softmax(-1)[order]
        before = chances.cumsum(-1) - chances
        kept, border = left[row].isfinite(), 1e-6  # of sums in float64, and of exponentials in float32
        assert kept[order[before < top_p - border]].all()
        assert not kept[order[before > top_p + border]].any()
        assert kept.sum() == kept[order].cumsum(0).argmax() + 1, "those before the last one are all there"
        assert kept[order[0]]


def test_what_top_p_leaves_does_not_depend_on_the_neighbours() -> None:
    scores, rule = logits(6, seed=4).repeat(1, 40), SamplingParams(top_p=0.9)
    together = Sampler([rule] * 6, 40 * VOCAB, CPU)._restrict(scores.clone())
    for row in range(6):
        alone = Sampler([rule], 40 * VOCAB, CPU)._restrict(scores[row : row + 1].clone())
        assert torch.equal(alone[0], together[row])


def test_log_probabilities_are_those_of_the_model_whatever_is_asked_of_the_draw() -> None:
    rules = [SamplingParams(**{**vars(rule), "logprobs": 2}) for rule in RULES]
    scores = logits(len(rules))
    drawn = sample(rules, scores, PROMPTS, STEPS, ENDS)
    assert drawn.logprobs is not None
    expected = scores.log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
    assert torch.equal(drawn.logprobs, expected)


def test_a_frequency_penalty_counts_and_a_presence_penalty_does_not() -> None:
    """Two tokens, of which the likelier one has been sampled three times, and is in the prompt as well."""
    scores = torch.full((1, VOCAB), -50.0)
    scores[0, 7], scores[0, 8] = 3.0, 0.5
    text = [7, 7, 7, 7, 7, 7]

    def greedy(**rules: float) -> int:
        return int(sample([SamplingParams(temperature=0, **rules)], scores, [text], [3]).tokens)  # type: ignore[arg-type]

    assert greedy(frequency_penalty=0.8) == 7
    assert greedy(frequency_penalty=0.9) == 8
    assert greedy(presence_penalty=2.0) == 7
    assert greedy(presence_penalty=2.0, frequency_penalty=0.2) == 8


def test_a_bias_bans_and_forces_tokens() -> None:
    scores = logits(2)
    best = int(scores[0].argmax())
    rules = [
        SamplingParams(temperature=0, logit_bias=((best, -100.0),)),
        SamplingParams(logit_bias=((17, 100.0),)),
    ]
    tokens = sample(rules, scores, [[0], [0]], [0, 0]).tokens.tolist()
    assert tokens == [int(scores[0].topk(2).indices[1]), 17]


def test_before_min_tokens_no_row_ends_and_then_it_may() -> None:
    rule, ends = SamplingParams(temperature=0, min_tokens=4), frozenset({5, 6})
    scores = torch.zeros(1, VOCAB)
    scores[0, 5], scores[0, 6], scores[0, 7] = 9.0, 8.0, 7.0
    assert [int(sample([rule], scores, [[0] * (step + 1)], [step], [ends]).tokens) for step in range(6)] == [7] * 4 + [
        5
    ] * 2


def test_temperature_zero_is_greedy_beside_rows_that_are_not() -> None:
    rules = [SamplingParams(temperature=0), SamplingParams(temperature=3), SamplingParams(temperature=1e-300)]
    scores = logits(3)
    tokens = sample(rules, scores, [[0]] * 3, [0] * 3).tokens
    assert tokens[0] == scores[0].argmax()
    assert tokens[2] == scores[2].argmax()


def test_a_greedy_row_keeps_to_its_repetition_penalty() -> None:
    rule = SamplingParams(temperature=0, repetition_penalty=100.0)
    scores, text = logits(1).abs(), [0]
    for step in range(10):
        text.append(int(sample([rule], scores, [text], [step]).tokens))
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
    drawn = sample(RULES, torch.full((len(RULES), VOCAB), value), PROMPTS, STEPS, ENDS)
    assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()
    assert not drawn.finite.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_one_logit_that_is_no_number_is_marked_and_no_other(value: float) -> None:
    scores = logits(len(RULES))
    scores[2, 7] = value
    scores[3, 7] = -float("inf")
    finite = sample(RULES, scores, PROMPTS, STEPS, ENDS).finite.tolist()
    assert finite == [row != 2 for row in range(len(RULES))]
