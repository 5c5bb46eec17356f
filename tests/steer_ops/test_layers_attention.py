"""Attention layers with fewer operations say what transformers' say, and those of another kind are left alone."""

from typing import Any

import pytest
import torch

from steer_ops import ROTARY, plain
from steer_ops.layers import RotaryAttention, _recorded_attention, fuse_attention
from steer_ops.linears import pack_linears
from steering.sites import site_module
from steering.types import Site
from tests.server.test_architectures import MORE, tiny
from tests.steer_ops import turning
from tests.steering.families import FAMILIES

pytestmark = pytest.mark.skipif(
    not ROTARY.has_kernel(torch.device("cpu"), torch.float32), reason="nothing can be compiled here"
)
IDS = torch.arange(3, 20)[None]


def fused(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, int]:
    model = tiny(name).to(dtype).eval()
    pack_linears(model)
    count = fuse_attention(model)
    model.set_attn_implementation(turning.NAME)
    return model, count


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_family_says_what_it_said(name: str) -> None:
    model, _ = fused(name)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, tiny(name)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", 1),
        ("qwen2", 1),
        ("qwen3", 1),
        ("gemma2", 1),
        ("mistral", 1),
        ("stablelm", 1),  # a quarter of each head is turned
        ("phi3", 1),  # one product of the model's own, all queries first
        ("gpt_neox", 1),  # the same, head by head
        ("gpt2", 0),
        ("cohere2", 0),
    ],
)
def test_only_what_says_the_same_is_exchanged(name: str, expected: int) -> None:
    model, count = fused(name)
    assert count == expected * model.config.num_hidden_layers
    assert fuse_attention(model) == 0, "again, and nothing changes"


def test_in_bfloat16() -> None:
    model, count = fused("llama", torch.bfloat16)
    assert count == model.config.num_hidden_layers
    with torch.no_grad():
        found, expected = model(IDS).logits.float(), tiny("llama").bfloat16()(IDS).logits.float()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_several_texts_and_a_cache_are_the_models_own_business(name: str) -> None:
    model, _ = fused(name)
    texts = torch.cat([IDS, IDS + 1])
    with torch.no_grad():
        assert torch.allclose(model(texts).logits, tiny(name)(texts).logits, rtol=1e-4, atol=1e-4)
        found = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, tiny(name).generate(IDS, max_new_tokens=5, do_sample=False))


def test_another_attention_is_the_models_own_business() -> None:
    model, _ = fused("llama")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, tiny("llama")(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "turned"), [("llama", 16), ("stablelm", 4)])
def test_an_attention_that_turns_is_given_what_it_is_to_turn(name: str, turned: int) -> None:
    model, _ = fused(name)
    layer = model.model.layers[0].self_attn
    x, angles = torch.randn(1, 5, model.config.hidden_size), torch.randn(1, 5, turned)
    with torch.no_grad(), _recorded_attention(model.config) as seen:
        layer(x, position_embeddings=(angles.cos(), angles.sin()))
        query, key = (layer._own[0].get_submodule(name)(x).view(5, -1, 16) for name in ("q_proj", "k_proj"))
    turned_query, turned_key = plain.rotary(query, key, angles.cos()[0], angles.sin()[0])
    for found, expected in zip(seen[0][:2], (turned_query, turned_key), strict=True):
        assert torch.allclose(found[0].transpose(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_the_configuration_names_the_same_attention_as_before() -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    pack_linears(model)
    assert fuse_attention(model)
    assert model.config._attn_implementation == before


def test_a_layer_has_its_sites() -> None:
    model, _ = fused("llama")
    layer = model.model.layers[1].self_attn
    assert isinstance(layer, RotaryAttention)
    heads, side = site_module(model, Site.parse("1.attn_heads"))
    assert heads is layer.o_proj
    assert side == "input"
    assert site_module(model, Site.parse("1.attn_output"))[0] in (layer, layer.o_proj)


def test_a_layer_that_does_more_is_left_alone() -> None:
    model = tiny("llama")
    kind = type(model.model.layers[0].self_attn)

    class Scaled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **named: Any) -> Any:
            found, weights = super().forward(*args, **named)
            return 2 * found, weights

    model.model.layers[0].self_attn.__class__ = Scaled
    pack_linears(model)
    assert fuse_attention(model) == model.config.num_hidden_layers - 1
    assert isinstance(model.model.layers[0].self_attn, Scaled)
