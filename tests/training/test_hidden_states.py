"""Samples of one prompt give the same activations from shared keys and values as each by itself, in every family."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from steering import Site, SiteKind
from tests.steering.families import COMMON, FAMILIES, VOCABULARY, tiny
from training.activations import Pool
from training.activations.hidden_states import (
    PooledPositions,
    _tight_batches,
    read_hidden_states,
    shared_states,
    worth_sharing,
)
from training.activations.tokenization import Encoded

SITE = Site(1, SiteKind.RESIDUAL)


def rows() -> list[Encoded]:
    """Five prompts of 1 to 14 tokens with six answers each, of 1 to 6 tokens."""
    made, number = [], torch.Generator().manual_seed(0)
    for length in (1, 9, 4, 9, 14):
        prompt = torch.randint(3, VOCABULARY, (length,), generator=number).tolist()
        for size in range(1, 7):
            answer = torch.randint(3, VOCABULARY, (size,), generator=number).tolist()
            made.append(Encoded((*prompt, *answer), length - 1, length + size - 1))
    return made


def one_by_one(model: Any, row: Encoded, pool: Pool) -> torch.Tensor:
    ids = torch.tensor([row.ids])
    return read_hidden_states(
        model, [SITE], PooledPositions.of([row], pool, model.device).take, input_ids=ids, use_cache=False
    )[SITE]


def check(model: Any, pool: Pool) -> None:
    assert worth_sharing(model, rows())
    seen: set[int] = set()
    for batch, states in shared_states(model, rows(), [SITE], pool, max_rows=7, max_tokens=1000):
        seen |= set(batch)
        expected = torch.cat([one_by_one(model, rows()[index], pool) for index in batch])
        torch.testing.assert_close(states[SITE], expected, rtol=1e-4, atol=1e-5)
    assert seen == set(range(30))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool", [Pool.MEAN, Pool.TOKENS])
def test_shared_prompts_change_nothing(family: str, pool: Pool) -> None:
    check(tiny(family), pool)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_sliding_window_shorter_than_the_prompts(implementation: str) -> None:
    settings = COMMON | {"sliding_window": 4, "attn_implementation": implementation}
    torch.manual_seed(0)
    check(MistralForCausalLM(MistralConfig(**settings, num_key_value_heads=1)).eval(), Pool.MEAN)


def test_a_prompt_runs_once() -> None:
    model, tokens = tiny("llama"), 0

    def count(module: Any, args: tuple[torch.Tensor]) -> None:
        nonlocal tokens
        tokens += args[0].numel()

    handle = model.model.embed_tokens.register_forward_pre_hook(count)
    for _ in shared_states(model, rows(), [SITE], Pool.LAST, max_rows=64, max_tokens=1000):
        pass
    handle.remove()
    # Each prompt but its last token, then that and the answers, padded to the longest of their batch.
    assert tokens == (0 + 8 + 3 + 8 + 13) + 7 * 6 * 5


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300))
def test_batches_of_answers_have_little_padding(lengths: list[int]) -> None:
    answers = [Encoded((3,) * length, 0, length - 1) for length in sorted(lengths)]
    parts = list(_tight_batches([list(range(len(answers)))], answers))
    assert [index for part in parts for index in part] == list(range(len(answers)))
    for part in parts:
        own = [len(answers[index].ids) for index in part]
        if sum(own[:-1]) >= 256:
            assert len(own) * own[-1] <= 1.1 * sum(own)


def test_nothing_is_shared_where_it_saves_little_or_might_change_something() -> None:
    assert not worth_sharing(tiny("llama"), rows()[::6])
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    torch.manual_seed(0)
    scaled = LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=scaling)).eval()
    assert not worth_sharing(scaled, rows())
    with_states = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    assert not worth_sharing(with_states, rows())
