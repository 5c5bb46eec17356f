"""Given texts: what the engine says of them is what whole passes of the plain model say."""

import math
from typing import Any

import pytest
import torch

from server.engine.divergence import Divergence
from server.engine.scoring import ComparisonPair
from server.engine.sequence import SamplingParams, SteeringParams
from server.errors import NotFinite, PromptTooLong
from steering.hook import steered
from steering.types import SequenceSteering
from tests.server.conftest import columns, tiny_llama
from tests.server.desk import Desk, sequence

PROMPT, STEERED, BASELINE = tuple(range(50, 62)), tuple(range(20, 40)), tuple(range(30, 44))


def logprobs(model: Any, prompt: tuple[int, ...], text: tuple[int, ...]) -> torch.Tensor:
    """[text, vocab], from one pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)[len(prompt) - 1 : -1]


def chosen(logs: torch.Tensor, text: tuple[int, ...]) -> list[float]:
    found: list[float] = logs.gather(1, torch.tensor(text)[:, None])[:, 0].tolist()
    return found


def mixed(desk: Desk, mix: tuple[float, ...]) -> SteeringParams:
    return SteeringParams(SequenceSteering.of([(desk.bank.add(columns(32, seed=1)), mix)]))


@pytest.fixture
def desk() -> Desk:
    return Desk(tiny_llama(320), num_blocks=32, max_num_batched_tokens=64)


@pytest.mark.parametrize("max_num_logits", [6, 10_000])
def test_a_comparison_is_that_of_whole_passes_however_small_its_chunks(model: Any, max_num_logits: int) -> None:
    desk = Desk(tiny_llama(320), num_blocks=32, max_num_logits=max_num_logits)
    mix = (1.0, -0.5, 0.5)
    pair = ComparisonPair(PROMPT, STEERED, BASELINE, mixed(desk, mix))
    divergence = desk.finish(desk.engine.compare(pair))
    mask = torch.arange(len(PROMPT) + len(STEERED))[None] >= len(PROMPT) - 1
    with steered(model, columns(32, seed=1), mix, mask=mask):
        mine = logprobs(model, PROMPT, STEERED)
    base = logprobs(model, PROMPT, STEERED)
    kl = float((mine.exp() * (mine - base)).sum(dim=-1).mean())
    assert kl > 0.01, "the test steers too weakly to prove anything"
    assert divergence.kl_per_token == pytest.approx(kl, rel=1e-3)
    under = sum(chosen(base, STEERED)) / len(STEERED)
    assert divergence.logprob_under_baseline == pytest.approx(under, rel=1e-4)
    own = sum(chosen(logprobs(model, PROMPT, BASELINE), BASELINE)) / len(BASELINE)
    assert divergence.perplexity_ratio == pytest.approx(math.exp(own - under), rel=1e-3)
    assert desk.blocks.num_free_blocks == desk.blocks.num_blocks
    desk.bank.check()


def test_comparisons_of_several_choices_are_computed_together(desk: Desk) -> None:
    steering = mixed(desk, (1.0, 0.0, 0.0))
    pairs = [ComparisonPair(PROMPT, (i, *STEERED[:5]), (i, 9, 8), steering) for i in range(8, 10)]

    def passes(tasks: list[list[ComparisonPair]]) -> tuple[int, list[Divergence]]:
        before, found = len(desk.computed), []
        for task in tasks:
            futures = [desk.engine.compare(pair) for pair in task]
            found += [desk.finish(future) for future in futures]
        return len(desk.computed) - before, found

    first, _ = passes([pairs])
    assert first <= 3, "the prompt, and then all of them"
    count, together = passes([pairs])
    assert count == 1
    count, alone = passes([[pair] for pair in pairs])
    assert count == len(pairs)
    for one, other in zip(together, alone, strict=True):
        assert one.kl_per_token == pytest.approx(other.kl_per_token, rel=1e-4)
        assert one.perplexity_ratio == pytest.approx(other.perplexity_ratio, rel=1e-4)


@pytest.mark.parametrize("mix", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.5)])
def test_scores_are_the_log_probabilities_of_whole_passes(desk: Desk, model: Any, mix: tuple[float, ...]) -> None:
    texts = [(9,), (9, 10, 11), *((index, 8, index) for index in range(1, 12))]
    scores = desk.finish(desk.engine.score([(PROMPT, text) for text in texts], mixed(desk, mix)))
    for text, one in zip(texts, scores, strict=True):
        mask = torch.arange(len(PROMPT) + len(text))[None] >= len(PROMPT) - 1
        with steered(model, columns(32, seed=1), mix, mask=mask):
            found = [each.logprob for each in one]
            assert found == pytest.approx(chosen(logprobs(model, PROMPT, text), text), rel=1e-4)
    assert desk.blocks.cached_tokens >= (len(texts) - 1) * (len(PROMPT) - 1), "the prompt is computed once"


def test_the_likeliest_alternatives_are_those_of_the_model(desk: Desk, model: Any) -> None:
    ((one, *_),) = desk.finish(desk.engine.score([(PROMPT, (9, 10))], SteeringParams(), top=3))
    best = logprobs(model, PROMPT, (9, 10))[0].topk(3)
    assert one.top_token_ids == tuple(best.indices.tolist())
    assert one.top_logprobs == pytest.approx(best.values.tolist(), rel=1e-4)


def test_a_text_that_was_generated_is_not_computed_again_up_to_where_it_is_needed(desk: Desk) -> None:
    asked = sequence(tuple(range(1, 31)), sampling_params=SamplingParams(max_new_tokens=5, temperature=0))
    text = tuple(desk.run([asked])[asked])
    before = desk.blocks.cached_tokens
    desk.finish(desk.engine.score([(asked.prompt_token_ids, text)], SteeringParams()))
    assert desk.blocks.cached_tokens - before == 29


@pytest.mark.parametrize("continuation", [(9, 20, 21), (20, 9, 21)])
def test_what_is_no_number_is_an_error_and_spoils_nobody_else(continuation: tuple[int, ...]) -> None:
    model = tiny_llama(320)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    desk = Desk(model, num_blocks=16)
    sound = desk.engine.compare(ComparisonPair((5, 6), (8, 20, 21), (30, 31), SteeringParams()))
    broken = desk.engine.compare(ComparisonPair((5, 6), continuation, (30, 31), SteeringParams()))
    score = desk.engine.score([((5, 6), continuation)], SteeringParams())
    for future in (broken, score):
        with pytest.raises(NotFinite):
            desk.finish(future)
    assert desk.finish(sound).kl_per_token == 0
    again = desk.finish(desk.engine.score([((5, 6), (8, 20))], SteeringParams()))
    assert all(math.isfinite(one.logprob) for one in again[0])


def test_a_text_that_never_fits_is_refused(desk: Desk) -> None:
    with pytest.raises(PromptTooLong, match=r"prompt is too long.*299 tokens; the cache has room for 256"):
        desk.engine.score([((1,) * 250, (2,) * 50)], SteeringParams())


def test_two_texts_that_never_fit_together_are_refused() -> None:
    desk = Desk(tiny_llama(320), num_blocks=10)
    with pytest.raises(PromptTooLong, match="2 such texts are read at once"):
        desk.engine.compare(ComparisonPair(PROMPT, (8,) * 40, (9,) * 40, SteeringParams()))


@pytest.mark.parametrize("num_blocks", [7, 9, 40])
def test_scores_are_the_same_however_small_the_cache(num_blocks: int) -> None:
    large, small = (Desk(tiny_llama(320), num_blocks=count) for count in (100, num_blocks))
    texts = [(PROMPT, (index, 8) * 20) for index in range(1, 12)]
    scores, expected = (desk.finish(desk.engine.score(texts, SteeringParams())) for desk in (small, large))
    for one, other in zip(scores, expected, strict=True):
        assert [each.logprob for each in one] == pytest.approx([each.logprob for each in other], rel=1e-4)


def test_a_short_text_is_generated_beside_many_scores(desk: Desk) -> None:
    desk.engine.score([((i, 3), (2,) * 40) for i in range(100)], SteeringParams())
    short = sequence((200, 201), sampling_params=SamplingParams(max_new_tokens=3, temperature=0))
    desk.add(short)
    steps = 0
    while short not in desk.finished:
        desk.step()
        steps += 1
    assert steps <= 5
    assert desk.engine.status.scoring > 50


def test_a_score_for_which_nobody_waits_any_more_goes_no_further(desk: Desk) -> None:
    future = desk.engine.score([((i, 3), (2,) * 40) for i in range(20)], SteeringParams())
    desk.step()
    assert desk.engine.status.scoring > 10
    future.cancel()
    desk.step()
    assert desk.engine.status.scoring == 0
    assert desk.blocks.num_free_blocks == desk.blocks.num_blocks


def test_two_texts_as_long_as_the_engine_says_can_be_compared() -> None:
    desk = Desk(tiny_llama(320), num_blocks=9)
    new = desk.engine.max_pair_tokens - len(PROMPT) + 1
    steering = SteeringParams(positions="all")
    pair = ComparisonPair(PROMPT, (8,) * new, (9,) * new, steering)
    assert desk.finish(desk.engine.compare(pair)).kl_per_token == 0
    with pytest.raises(PromptTooLong):
        desk.engine.compare(ComparisonPair(PROMPT, (8,) * (new + 1), (9,), steering))


def test_nothing_to_score_is_refused_where_it_is_asked_for(desk: Desk) -> None:
    for ask in (
        lambda: desk.engine.score([(PROMPT, ())], SteeringParams()),
        lambda: desk.engine.compare(ComparisonPair(PROMPT, (8,), (), SteeringParams())),
    ):
        with pytest.raises(ValueError, match="at least one token"):
            ask()
    desk.step()
    assert desk.finish(desk.engine.score([(PROMPT, (8,))], SteeringParams())), "the engine goes on"
