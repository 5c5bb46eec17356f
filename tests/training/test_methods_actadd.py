"""ActAdd: one pair of prompts is enough."""

from typing import Any

import pytest
import torch

from steering import Site, SiteKind
from training.activations import Pool
from training.activations.extraction import extract
from training.errors import FitError
from training.methods.actadd import ActAddConfig
from training.methods.fit import Recipe, fit

SITES = [Site(0, SiteKind.RESIDUAL), Site(2, SiteKind.RESIDUAL)]


def test_the_vector_is_the_difference_of_the_last_tokens(llama: Any, tokenizer: Any) -> None:
    pair = ActAddConfig(("I love the green grass", "I hate it"), "love")
    activations = extract(llama, tokenizer, pair.own_samples(), SITES, pool=Pool.LAST)
    columns = fit(activations, SITES, Recipe(pair))
    assert [(column.attribute, column.site) for column in columns] == [("love", site) for site in SITES]
    with torch.no_grad():
        states = [
            llama(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            for text in ("I love the green grass", "I hate it")
        ]
    # hidden_states ends with the states after the final norm: the last layer's own are not among them.
    torch.testing.assert_close(columns[0].vector, states[0][1][0, -1] - states[1][1][0, -1], rtol=1e-4, atol=1e-5)
    assert columns[0].default_multiplier == 1.0


def test_the_attribute_is_named_after_the_positive_prompt() -> None:
    assert ActAddConfig((" Love ", "Hate")).name == "Love"
    assert ActAddConfig(("Love", "Hate"), "warmth").name == "warmth"


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("", "Hate", None), "is empty"),
        (("Love", "  ", None), "is empty"),
        (("Love", "Love", None), "no difference"),
        (("Love " * 20, "Hate", None), "1 to 64 printable characters"),
        (("Love", "Hate", "two\nlines"), "1 to 64 printable characters"),
        (("Love", "Hate", ""), "1 to 64 printable characters"),
    ],
)
def test_a_pair_that_says_nothing_is_refused(pair: tuple[str, str, str | None], said: str) -> None:
    with pytest.raises(FitError, match=said):
        ActAddConfig(pair[:2], pair[2])
