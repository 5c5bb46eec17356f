"""The runner alone: batches of any shape give what `transformers.generate` gives, in every model family."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, MixtralConfig, Qwen3Config

from server.engine.forward import Forward
from server.engine.runner import Runner
from server.engine.types import Batch, Pair, Row, Sampling, Steer
from server.errors import NotFinite
from steering.columns import ColumnBank
from steering.hook import Steering
from tests.server.conftest import tiny_llama

SHARED: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = [
    Qwen3Config(**SHARED, num_key_value_heads=2, head_dim=8),
    GPTNeoXConfig(**SHARED),
    Gemma3TextConfig(**SHARED, num_key_value_heads=2, head_dim=8, sliding_window=8),
    MixtralConfig(**SHARED, num_key_value_heads=2, num_local_experts=4),
    GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, eos_token_id=None, bos_token_id=None),
]
LENGTHS = {3: 30, 12: 8, 7: 25, 1: 12, 20: 44}  # prompt: new tokens; the last one fills the model's 64 positions


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_a_mixed_batch_equals_generate_whatever_the_architecture(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.25)
    runner = Runner(Forward(model, ColumnBank(device="cpu", max_tokens=1)), context=64)
    rows = tuple(
        Row("r", index, index, tuple(torch.randint(1, 97, (length,)).tolist()), Sampling(temperature=0))
        for index, length in enumerate(LENGTHS)
    )
    texts: dict[Row, list[int]] = {row: [] for row in rows}
    live, fresh, widths = rows, True, []
    while live:
        for row, draw in zip(live, runner.step(Batch(live, fresh)), strict=True):
            texts[row].append(draw.token)
        widths.append(runner.rows)
        live, fresh = tuple(row for row in live if len(texts[row]) < LENGTHS[len(row.tokens)]), False
    assert widths[0] == 5
    assert widths[-1] == 1, "ended rows leave the tensors"
    for row, text in texts.items():
        ids = torch.tensor([row.tokens])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(text), pad_token_id=0
        )
        assert text == expected[0, ids.shape[1] :].tolist()


def test_a_comparison_read_in_small_chunks_is_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from steering.columns import RowSteering
    from tests.server.conftest import columns

    bank = ColumnBank(device="cpu", max_tokens=1)
    handle = bank.add(columns(32, seed=1))
    pair = Pair((5, 6, 7), tuple(range(20, 40)), tuple(range(30, 44)), Steer(RowSteering.of([(handle, (1, -1, 0.5))])))
    with Steering(model, bank):
        runner = Runner(Forward(model, bank), context=64)
        whole = runner.compare(pair)
        monkeypatch.setattr("server.engine.comparison.BUDGET", 3 * 320 * 4)
        small = runner.compare(pair)
    assert vars(small) == pytest.approx(vars(whole), rel=1e-4)
    assert whole.kl_per_token > 0.01
    bank.check()


def test_a_model_without_a_known_limit_is_served(model: Any) -> None:
    runner = Runner(Forward(model, ColumnBank(device="cpu", max_tokens=1)), context=None)
    row = Row("r", 0, 0, (5, 6, 7), Sampling(temperature=0))
    tokens = [runner.step(Batch((row,), fresh))[0].token for fresh in (True, False, False)]
    ids = torch.tensor([row.tokens])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, pad_token_id=0, eos_token_id=None
    )
    assert tokens == expected[0, 3:].tolist()


def test_a_comparison_that_is_no_number_is_an_error_and_not_a_zero(tokenizer: Any) -> None:
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    runner = Runner(Forward(model, ColumnBank(device="cpu", max_tokens=1)), context=64)
    with pytest.raises(NotFinite):
        runner.compare(Pair((5, 6), (9, 20, 21), (30, 31), Steer()))
    assert runner.compare(Pair((5, 6), (8, 20, 21), (30, 31), Steer())).kl_per_token == pytest.approx(0, abs=1e-6)
