"""Given texts: what the engine says of them is what whole passes of the plain model say."""

import math
from typing import Any

import pytest
import torch

from server.engine import reading
from server.engine.reading import compare, score
from server.engine.tape import Tape
from server.engine.types import Pair, Row, Sampling, Steer
from server.errors import NotFinite, PromptTooLong
from steering.columns import RowSteering
from steering.hook import steered
from tests.server.conftest import columns, tiny_llama
from tests.server.desk import Desk

PROMPT, STEERED, BASELINE = (5, 6, 7), tuple(range(20, 40)), tuple(range(30, 44))


def logprobs(model: Any, prompt: tuple[int, ...], text: tuple[int, ...]) -> torch.Tensor:
    """[text, vocab], from one pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)[len(prompt) - 1 : -1]


def told(logs: torch.Tensor, text: tuple[int, ...]) -> list[float]:
    found: list[float] = logs.gather(1, torch.tensor(text)[:, None])[:, 0].tolist()
    return found


@pytest.fixture
def desk() -> Desk:
    return Desk(tiny_llama(320), largest=64, roots=4, step_tokens=64)


def test_a_comparison_is_that_of_whole_passes_however_small_its_parts(
    desk: Desk, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = (1.0, -1.0, 0.5)
    handle = desk.bank.add(columns(32, seed=1))
    pair = Pair(PROMPT, STEERED, BASELINE, Steer(RowSteering.of([(handle, mix)])))
    whole = desk.finish(compare(desk.runner, pair))
    monkeypatch.setattr(reading, "BUDGET", 3 * 320)
    small = desk.finish(compare(desk.runner, pair))
    assert vars(small) == pytest.approx(vars(whole), rel=1e-4)

    mask = torch.arange(len(PROMPT) + len(STEERED))[None] >= len(PROMPT) - 1
    with steered(model, columns(32, seed=1), mix, mask=mask):
        mine = logprobs(model, PROMPT, STEERED)
    base = logprobs(model, PROMPT, STEERED)
    assert whole.kl_per_token == pytest.approx(float((mine.exp() * (mine - base)).sum(-1).mean()), rel=1e-4)
    assert whole.kl_per_token > 0.01
    under = sum(told(base, STEERED)) / len(STEERED)
    assert whole.logprob_under_baseline == pytest.approx(under, rel=1e-4)
    own = sum(told(logprobs(model, PROMPT, BASELINE), BASELINE)) / len(BASELINE)
    assert whole.perplexity_ratio == pytest.approx(math.exp(own - under), rel=1e-3)
    desk.cache.check()
    desk.bank.check()


@pytest.mark.parametrize("mix", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.5)])
def test_scores_are_the_log_probabilities_of_whole_passes(desk: Desk, model: Any, mix: tuple[float, ...]) -> None:
    handle = desk.bank.add(columns(32, seed=1))
    texts = [(9,), (9, 10, 11), *((index, 8, index) for index in range(1, 12))]
    scores = desk.finish(score(desk.runner, [(PROMPT, text) for text in texts], Steer(RowSteering.of([(handle, mix)]))))
    for text, one in zip(texts, scores, strict=True):
        mask = torch.arange(len(PROMPT) + len(text))[None] >= len(PROMPT) - 1
        with steered(model, columns(32, seed=1), mix, mask=mask):
            found = [likelihood.logprob for likelihood in one]
            assert found == pytest.approx(told(logprobs(model, PROMPT, text), text), rel=1e-4)
    assert desk.cache.shared_tokens >= (len(texts) - 1) * (len(PROMPT) - 1), "the prompt is read once"
    desk.cache.check()


def test_a_text_that_was_generated_is_not_computed_again_up_to_where_it_is_needed(desk: Desk) -> None:
    row = Row("r", 0, tuple(range(1, 31)), Sampling(max_new_tokens=5, temperature=0))
    text = tuple(desk.run([row])[row])
    before = desk.cache.shared_tokens
    desk.finish(score(desk.runner, [(row.tokens, text)], Steer()))
    assert desk.cache.shared_tokens - before == 29


def test_a_comparison_that_is_no_number_is_an_error_and_not_a_zero() -> None:
    model = tiny_llama(320)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    desk = Desk(model, largest=64, roots=4)
    with pytest.raises(NotFinite):
        desk.finish(compare(desk.runner, Pair((5, 6), (9, 20, 21), (30, 31), Steer())))
    assert desk.finish(compare(desk.runner, Pair((5, 6), (8, 20, 21), (30, 31), Steer()))).kl_per_token == 0


def test_a_text_that_never_fits_is_refused(desk: Desk) -> None:
    with pytest.raises(PromptTooLong):
        desk.finish(score(desk.runner, [((1,) * 60, (2,) * 10)], Steer()))


@pytest.mark.parametrize("roots", [1, 2, 3])
def test_as_many_texts_are_read_at_once_as_the_cache_has_room_for(roots: int) -> None:
    large, small = Desk(tiny_llama(320), largest=64, roots=16), Desk(tiny_llama(320), largest=64, roots=roots)
    texts = [(PROMPT, (index, 8) * 20) for index in range(1, 12)]
    (scores, expected) = (desk.finish(score(desk.runner, texts, Steer())) for desk in (small, large))
    for one, other in zip(scores, expected, strict=True):
        assert [each.logprob for each in one] == pytest.approx([each.logprob for each in other], rel=1e-4)
    small.cache.check()


def test_two_texts_that_never_fit_together_are_refused() -> None:
    desk = Desk(tiny_llama(320), largest=64, roots=1)
    with pytest.raises(PromptTooLong):
        desk.finish(compare(desk.runner, Pair(PROMPT, (8,) * 40, (9,) * 40, Steer())))


def test_a_reading_waits_for_space_and_holds_none_meanwhile(desk: Desk) -> None:
    rows = [Row("r", i, (i + 1,) * 40, Sampling(max_new_tokens=20, temperature=0)) for i in range(4)]
    desk.scheduler.add(map(Tape.of, rows))
    for _ in range(3):
        desk.step()
    assert len(desk.scheduler.running) == 4
    job = score(desk.runner, [((1,) * 20, (2,) * 30)], Steer())
    desk.scheduler.hold = next(job)
    assert desk.scheduler.hold
    desk.cache.check()
    waited = 0
    while desk.scheduler.hold:
        desk.step()
        desk.scheduler.hold = next(job)
        waited += 1
    assert 10 < waited < 40
    desk.finish(job)
    desk.cache.check()
