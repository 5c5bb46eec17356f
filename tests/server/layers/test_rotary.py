"""Rotary embeddings in one operation turn what transformers' turn, and those of another kind are left alone."""

import pytest
import torch
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from server.layers.rotary import ARGUMENTS, NAME, SOURCE, FusedRotary, fuse_rotary
from steering.native import kernels
from tests.server.test_architectures import tiny

pytestmark = pytest.mark.skipif(not kernels(SOURCE, ARGUMENTS), reason="nothing can be compiled here")
OWN = modeling_llama.apply_rotary_pos_emb
Angles = tuple[torch.Tensor, torch.Tensor]


def angles(tokens: int, width: int, dtype: torch.dtype) -> Angles:
    """The same every time."""
    random = torch.Generator().manual_seed(0)
    turned = torch.randn(1, tokens, width, generator=random)  # the halves differ: theirs must not be mixed up
    return turned.cos().to(dtype), turned.sin().to(dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 9, 700])
@pytest.mark.parametrize("width", [2, 18, 64])
def test_it_turns_as_llama_does(dtype: torch.dtype, tokens: int, width: int) -> None:
    mine = FusedRotary(OWN, kernels(SOURCE, ARGUMENTS))
    whole = torch.randn(1, tokens, 7, width).to(dtype)  # as one product gives them
    query, key = whole[:, :, :4].transpose(1, 2), whole[:, :, 4:6].transpose(1, 2)
    expected = OWN(query, key, *angles(tokens, width, dtype))
    for found, other in zip(mine(query, key, *angles(tokens, width, dtype)), expected, strict=True):
        assert found.shape == other.shape
        if dtype == torch.bfloat16:
            assert torch.equal(found, other)
        assert torch.allclose(found, other, rtol=1e-6, atol=1e-6)


def test_what_the_kernel_does_not_know_is_turned_by_the_models_own_function() -> None:
    mine = FusedRotary(OWN, kernels(SOURCE, ARGUMENTS))
    query, key = torch.randn(1, 3, 5, 8), torch.randn(1, 1, 5, 8)
    cases = {
        "two texts": (query.repeat(2, 1, 1, 1), key.repeat(2, 1, 1, 1), *angles(5, 8, torch.float32)),
        "another dtype": (query.double(), key.double(), *angles(5, 8, torch.float64)),
        "more keys": (query, key.repeat(2, 1, 1, 1), *angles(5, 8, torch.float32)),
        "mixed dtypes": (query, key, *angles(5, 8, torch.bfloat16)),
        "numbers apart": (query.mT.contiguous().mT, key, *angles(5, 8, torch.float32)),
        "gradients": (query.clone().requires_grad_(), key, *angles(5, 8, torch.float32)),
    }
    for name, case in cases.items():
        for found, expected in zip(mine(*case), OWN(*case), strict=True):
            assert torch.equal(found, expected), name
    named = dict(zip(("q", "k", "cos", "sin"), cases["gradients"], strict=True))
    for found, expected in zip(mine(**named), OWN(**named), strict=True):
        assert torch.equal(found, expected)
    flat = query.transpose(1, 2), key.transpose(1, 2), *angles(5, 8, torch.float32)
    for found, expected in zip(mine(*flat, unsqueeze_dim=2), OWN(*flat, unsqueeze_dim=2), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "fused"), [("llama", 1), ("qwen3", 1), ("gemma2", 1), ("gpt2", 0), ("cohere2", 0), ("phi3", 1)]
)
def test_only_what_says_the_same_is_exchanged(name: str, fused: int) -> None:
    model = tiny(name)
    expected = tiny(name)(torch.arange(9)[None]).logits
    assert fuse_rotary(model) == fused * model.config.num_hidden_layers
    assert fuse_rotary(model) == 0, "again, and nothing changes"
    with torch.no_grad():
        assert torch.allclose(model(torch.arange(9)[None]).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_file_and_other_models_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    before, other = modeling_llama.apply_rotary_pos_emb, tiny("llama")
    model = tiny("llama")
    turned = []
    fuse_rotary(model)
    monkeypatch.setattr(FusedRotary, "__call__", lambda self, *given: turned.append(1) or self.own(*given))
    assert modeling_llama.apply_rotary_pos_emb is before
    other(torch.arange(9)[None])
    assert not turned
    model(torch.arange(9)[None])
    assert len(turned) == model.config.num_hidden_layers


def test_another_way_of_turning_is_seen() -> None:
    """Cohere turns neighbours, GPT-NeoX a part of each head; both say so by what comes out."""
    query, key = torch.randn(1, 3, 5, 8), torch.randn(1, 1, 5, 8)
    found = FusedRotary(OWN, kernels(SOURCE, ARGUMENTS))(query, key, *angles(5, 8, torch.float32))
    cohere = getattr(modeling_cohere2, NAME)(query, key, *angles(5, 8, torch.float32))
    assert not torch.allclose(found[0], cohere[0])
    half = angles(5, 4, torch.float32)
    own = getattr(modeling_gpt_neox, NAME)
    for part, expected in zip(
        FusedRotary(own, kernels(SOURCE, ARGUMENTS))(query, key, *half), own(query, key, *half), strict=True
    ):
        assert torch.equal(part, expected)
