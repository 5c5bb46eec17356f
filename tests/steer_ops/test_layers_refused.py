"""Layers are exchanged one by one: what would compute something else is left out, and the log says so."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from steer_ops import ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL, linears
from steer_ops.layers import exchange_layers
from steer_ops.linears import DenseLinear
from steer_ops.registry import Op
from tests.server.test_architectures import tiny
from tests.steer_ops import turning

OPS = (ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL)
IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are the kernels, and products are PyTorch's."""
    for op in OPS:
        monkeypatch.setitem(op._chosen, ("cpu", torch.float32), lambda *args, reference=op.reference: reference(*args))
    monkeypatch.setattr(linears, "_packed", lambda weight, bias, native: DenseLinear(weight, bias))


def wrong(op: Op) -> Any:
    """The op, 1 % off in the last of its numbers."""

    def kernel(*args: Any) -> Any:
        result = op.reference(*args)
        last: Tensor = result[-1] if isinstance(result, tuple) else result
        last[..., -1] *= 1.01
        return result

    return kernel


def kinds(model: Any) -> Counter[str]:
    return Counter(
        type(module).__name__ + (" with another forward" if "forward" in vars(module) else "")
        for module in model.modules()
    )


@pytest.mark.parametrize(
    ("op", "exchanged", "own", "said"),
    [
        (RMS_NORM, "FusedRMSNorm", "LlamaRMSNorm", "7 layers LlamaRMSNorm stay as they are: the fused norm"),
        (SILU_MUL, "GatedMLP", "LlamaMLP", "3 layers LlamaMLP stay as they are: the fused gate"),
        (ROTARY, "RotaryAttention", "LlamaAttention", "3 layers LlamaAttention stay as they are: the fused rotary"),
        (
            ADD_RMS_NORM,
            "LlamaDecoderLayer with another forward",
            "LlamaDecoderLayer",
            "3 layers LlamaDecoderLayer stay as they are: the fused residual addition",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else None,
)
def test_a_layer_whose_exchange_computes_something_else_stays(
    op: Op, exchanged: str, own: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "steer_ops.linears")
    good, bad = tiny("llama"), tiny("llama")
    before = kinds(bad)
    exchange_layers(good)
    assert kinds(good)[exchanged]
    assert not caplog.text
    monkeypatch.setitem(op._chosen, ("cpu", torch.float32), wrong(op))
    exchange_layers(bad)
    assert said in caplog.text
    assert kinds(bad)[exchanged] == 0
    assert kinds(bad)[own] == before[own]
    bad.set_attn_implementation(turning.NAME)
    with torch.no_grad():
        assert torch.allclose(bad(IDS).logits, tiny("llama")(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_product_that_computes_something_else_is_not_used_and_others_are(
    layer: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one layer, keys and values change places."""
    caplog.set_level("INFO", "steer_ops.linears")
    model = tiny("llama")
    of_layer = model.model.layers[layer].self_attn
    weights = [part.weight for part in (of_layer.q_proj, of_layer.k_proj, of_layer.v_proj)]

    def packed(weight: Tensor, bias: Tensor | None, native: bool) -> DenseLinear:
        if torch.equal(weight, torch.cat(weights)):
            weight = torch.cat([weights[0], weights[2], weights[1]])
        return DenseLinear(weight, bias)

    monkeypatch.setattr(linears, "_packed", packed)
    exchange_layers(model)
    assert "3 layers Linear stay as they are: the packed product computes something else" in caplog.text
    found = [type(one.self_attn).__name__ for one in model.model.layers]
    assert found == ["LlamaAttention" if index == layer else "RotaryAttention" for index in range(3)]
    model.set_attn_implementation(turning.NAME)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, tiny("llama")(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_layer_that_clamps_its_queries_stays() -> None:
    """OLMo's, which differ from a Llama's where activations are large alone."""
    config = transformers.OlmoConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, clip_qkv=8.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.OlmoForCausalLM(config).eval()
    exchange_layers(model)
    assert kinds(model)["RotaryAttention"] == 0
    assert kinds(model)["OlmoAttention"] == 2
