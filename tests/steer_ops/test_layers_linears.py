"""Packed layers compute what the plain ones do."""

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from steer_ops import linears
from steer_ops.linears import JoinedLinear, PackedLinear, TiledLinear, pack_linears
from steering.sites import site_width
from steering.types import SiteKind
from tests.server.test_architectures import tiny


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_a_packed_layer_computes_the_same_for_any_number_of_tokens(
    dtype: torch.dtype, bias: bool, native: bool
) -> None:
    layer = nn.Linear(48, 80, bias=bias).to(dtype)
    holder = nn.Sequential(layer)
    tiled = native and TiledLinear.takes(layer.weight)
    expected = TiledLinear if tiled else PackedLinear if PackedLinear.takes(dtype) else nn.Linear
    assert pack_linears(holder, native=native) == (expected is not nn.Linear)
    assert type(holder[0]) is expected
    assert torch.equal(holder[0].weight, layer.weight)
    for tokens in (1, 2, 7, 33, 300):
        x = torch.randn(1, tokens, 48, dtype=dtype)
        with torch.inference_mode():
            assert torch.allclose(holder(x), layer(x), rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 5), (64, 96), (1024, 33), (5000, 70)])
def test_a_token_gets_the_same_bits_whatever_is_computed_beside_it(
    inputs: int, outputs: int, dtype: torch.dtype, tolerance: float
) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    if not TiledLinear.takes(weight):
        pytest.skip("no g++, or another CPU")
    layer = TiledLinear(weight, bias)
    assert torch.equal(layer.weight, weight)
    x = torch.randn(450, inputs).to(dtype)
    expected = x.double() @ weight.double().T + bias
    alone = torch.cat([layer(one[None]) for one in x])
    assert ((alone - expected).norm() / expected.norm()) < tolerance
    for tokens in (2, 5, 12, 13, 31, 193, 450):
        assert torch.equal(layer(x[:tokens]), alone[:tokens])
    assert torch.equal(layer(x[::3]), alone[::3])
    assert layer(x[:0]).shape == (0, outputs)


@pytest.mark.parametrize("x", [torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 10)])
def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    holder = nn.Sequential(nn.Linear(8, 4))
    pack_linears(holder)
    with pytest.raises((ValueError, RuntimeError)):
        holder(x)


def test_what_onednn_cannot_compute_here_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "takes", staticmethod(lambda dtype: dtype == torch.float32))
    holder = nn.Sequential(
        nn.Linear(7, 4, dtype=torch.bfloat16), nn.Linear(8, 4, dtype=torch.bfloat16), nn.Linear(7, 4)
    )
    assert pack_linears(holder, native=False) == 1
    assert [type(layer) for layer in holder] == [nn.Linear, nn.Linear, PackedLinear]


def test_half_a_unit_of_inputs_is_not_for_tiles() -> None:
    assert not TiledLinear.takes(torch.zeros(4, 7, dtype=torch.bfloat16))


def test_a_conv1d_is_a_linear_layer_with_its_weight_turned() -> None:
    layer = Conv1D(80, 48)
    holder = nn.Sequential(layer)
    pack_linears(holder)
    x = torch.randn(3, 48)
    with torch.inference_mode():
        assert torch.allclose(holder(x), layer(x), rtol=1e-4, atol=1e-5)


def test_what_is_not_exactly_a_linear_layer_stays() -> None:
    class Own(nn.Linear):
        pass

    holder = nn.Sequential(Own(4, 4), nn.Linear(4, 4, dtype=torch.float16), nn.Embedding(4, 4))
    assert pack_linears(holder) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_a_packed_model_says_the_same_and_has_the_same_sites(name: str) -> None:
    plain, packed = tiny(name), tiny(name)
    widths = site_width(packed, SiteKind.ATTN_HEADS)
    assert pack_linears(packed) >= 3
    assert site_width(packed, SiteKind.ATTN_HEADS) == widths
    ids = torch.randint(0, 61, (1, 20))
    with torch.inference_mode():
        assert torch.allclose(packed(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)


class Three(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(48, out, bias=bias) for out in (64, 16, 32))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_one_input_are_one_product_and_say_what_each_says_alone(bias: bool) -> None:
    holder = Three(bias=bias)
    plain = dict(holder.named_children())
    assert pack_linears(holder) == 3
    x, y = torch.randn(1, 5, 48), torch.randn(2, 3, 48)
    with torch.inference_mode():
        for name, layer in plain.items():
            joined = getattr(holder, name)
            assert isinstance(joined, JoinedLinear)
            assert torch.equal(joined.weight, layer.weight)
            assert joined.bias is None if not bias else torch.equal(joined.bias, layer.bias)
        for order in (
            ("q_proj", "k_proj", "v_proj"),
            ("v_proj", "q_proj", "k_proj"),
            ("k_proj",),
            ("k_proj", "k_proj"),
        ):
            for given in (x, y):  # also after another tensor, and after calls that never came
                for name in order:
                    assert torch.allclose(getattr(holder, name)(given), plain[name](given), rtol=1e-5, atol=1e-5)


def test_a_tensor_that_has_changed_between_two_passes_is_computed_anew() -> None:
    holder = Three(bias=False)
    plain = dict(holder.named_children())
    pack_linears(holder)
    x = torch.randn(1, 5, 48)
    with torch.inference_mode():
        holder.q_proj(x)
        x.mul_(2)
        assert torch.allclose(holder.q_proj(x), plain["q_proj"](x), rtol=1e-5, atol=1e-5)
        assert torch.allclose(holder.k_proj(x), plain["k_proj"](x), rtol=1e-5, atol=1e-5)


def test_layers_of_which_only_some_have_a_bias_stay_apart() -> None:
    holder = Three(bias=True)
    holder.k_proj = nn.Linear(48, 16, bias=False)
    assert pack_linears(holder) == 3
    assert isinstance(holder.k_proj, PackedLinear | TiledLinear)


def test_weights_that_have_been_replaced_are_freed_before_the_next_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model takes twice its memory while it is opened."""
    model, real = tiny("llama"), linears._joined
    waiting = [(weakref.ref(one.q_proj.weight), weakref.ref(one.o_proj.weight)) for one in attention_layers(model)]
    begun: list[Any] = []

    def joined(layers: dict[str, Any], native: bool) -> dict[str, JoinedLinear]:
        if "q_proj" in layers:
            assert not any(weight() for pair in waiting[: len(begun)] for weight in pair)
            begun.append(layers["q_proj"].in_features)
        return real(layers, native)

    monkeypatch.setattr(linears, "_joined", joined)
    pack_linears(model)
    assert len(begun) == len(waiting) > 1


def attention_layers(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]
