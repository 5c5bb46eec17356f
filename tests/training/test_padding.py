"""A padded batch gives what its rows give alone, whatever the pad token is: without an embedding, or a broken one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from steering import Site
from tests.training.helpers import make_llama, make_tokenizer
from training.activations import Pool
from training.activations.extraction import extract
from training.data import Sample
from training.errors import DataError
from training.evaluation.choices import evaluate_choices
from training.evaluation.generation import Sampling, generate
from training.evaluation.results import BASELINE
from training.evaluation.tasks import questions

SITES = [Site.parse("1.residual"), Site.parse("2.attn_output")]
PROMPTS = ["Q: What do cows say? A:", "Q:", "Q: Where do bees live? Tell me, you silly person. A:"]


def outside() -> tuple[Any, Any]:
    """The pad token was added to the tokenizer alone."""
    tokenizer, model = make_tokenizer(), make_llama()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
    return model, tokenizer


def not_finite() -> tuple[Any, Any]:
    """Weights of a token that was never trained."""
    tokenizer, model = make_tokenizer(), make_llama()
    tokenizer.pad_token = "ÿ"  # a byte that is in no UTF-8 text
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.pad_token_id] = float("nan")
        model.get_input_embeddings().weight[0] = float("nan")  # what is taken where there is no pad token
    return model, tokenizer


def none() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    return make_llama(), tokenizer


PADS = pytest.mark.parametrize("make", [outside, not_finite, none])


@PADS
@pytest.mark.parametrize("shared", [True, False])
def test_activations_are_those_of_each_text_alone(
    make: Callable[[], tuple[Any, Any]], shared: bool, samples: list[Sample]
) -> None:
    model, tokenizer = make()
    chosen = samples if shared else [Sample("t", PROMPTS[n % 3], f" {n}", True, f"g{n}") for n in range(9)]
    for pool in Pool:
        together = extract(model, tokenizer, chosen, SITES, pool=pool)
        alone = extract(model, tokenizer, chosen, SITES, pool=pool, max_rows=1)
        for site in SITES:
            torch.testing.assert_close(together.values[site], alone.values[site], rtol=1e-4, atol=1e-5)


@PADS
def test_answers_and_texts_are_those_of_each_prompt_alone(
    make: Callable[[], tuple[Any, Any]], samples: list[Sample]
) -> None:
    model, tokenizer = make()
    asked = questions(samples)
    together, alone = (evaluate_choices(model, tokenizer, asked, (), [BASELINE], max_rows=rows) for rows in (64, 1))
    for name, estimate in together.arms[0].metrics.items():
        assert estimate.value == pytest.approx(alone.arms[0].metrics[name].value, rel=1e-4)
    sampling = Sampling(temperature=0, max_new_tokens=6)
    texts, each = (generate(model, tokenizer, PROMPTS, (), [BASELINE], sampling, max_rows=rows) for rows in (64, 1))
    assert [text.token_ids for text in texts] == [text.token_ids for text in each]
    assert [text.nll for text in texts] == pytest.approx([text.nll for text in each], rel=1e-4, nan_ok=True)


def test_a_token_without_an_embedding_in_a_text_is_named(samples: list[Sample]) -> None:
    model, tokenizer = outside()
    text = "Q: <|pad|> A:"
    for does in (
        lambda: extract(model, tokenizer, [Sample("t", text, " a", True, "g")], SITES),
        lambda: generate(model, tokenizer, [text], (), [BASELINE], Sampling()),
        lambda: evaluate_choices(
            model, tokenizer, questions([Sample("t", text, f" {n}", bool(n), "g") for n in (0, 1)]), (), [BASELINE]
        ),
    ):
        with pytest.raises(DataError, match=r"holds '<\|pad\|>', which is token \d+, and the model has embeddings"):
            does()
