"""RMS norms in one operation say what transformers' say, and those of another kind are left alone."""

from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from steer_ops import RMS_NORM
from steer_ops.layers import FusedRMSNorm, fuse_norms
from tests.server.test_architectures import tiny

pytestmark = pytest.mark.skipif(
    not RMS_NORM.has_kernel(torch.device("cpu"), torch.float32), reason="nothing can be compiled here"
)


def norm(kind: type, dtype: torch.dtype, width: int = 77) -> torch.nn.Sequential:
    torch.manual_seed(0)
    found = kind(width, eps=1e-3)
    torch.nn.init.normal_(found.weight)
    return torch.nn.Sequential(found.to(dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 77), (77,), (2, 0, 77), (1, 2000, 77)])
def test_it_is_the_norm_of_its_kind(kind: type, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Llama's rounds before the product with the weight and after it, the others after it; Gemma's adds 1 to it."""
    own, mine = norm(kind, dtype), norm(kind, dtype)
    assert fuse_norms(mine) == 1
    x = (4 * torch.randn(shape)).to(dtype)
    found, expected = mine(x), own(x)
    assert found.shape == expected.shape
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert (found == expected).float().mean() > 0.99 or dtype == torch.float32 or not found.numel()


def test_a_view_is_normed_like_its_copy() -> None:
    mine = norm(LlamaRMSNorm, torch.float32)
    fuse_norms(mine)
    x = torch.randn(1, 5, 3 * 77)[..., 77 : 2 * 77]
    assert torch.equal(mine(x), mine(x.clone()))


def test_heads_of_a_product_are_normed_where_they_lie() -> None:
    """As Qwen 3 and Gemma 3 have it: parts of what one product gives."""
    mine = norm(LlamaRMSNorm, torch.float32)
    fuse_norms(mine)
    product = torch.randn(5, 6 * 77)
    with torch.autograd.profiler.profile() as seen:
        found = [mine(part.view(5, -1, 77)) for part in product.split([4 * 77, 2 * 77], dim=1)]
    assert {"aten::clone", "aten::contiguous", "aten::copy_"}.isdisjoint(event.name for event in seen.function_events)
    assert torch.equal(torch.cat(found, dim=1), mine(product.view(5, 6, 77)))


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden_states * gate)


class TwofoldRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        return super().forward(hidden_states), hidden_states


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 2 * hidden_states


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (LlamaRMSNorm, torch.float16),
        (LlamaRMSNorm, torch.float64),
        (torch.nn.LayerNorm, torch.float32),
        (GatedRMSNorm, torch.float32),
        (TwofoldRMSNorm, torch.float32),
        (ShiftedRMSNorm, torch.float32),
    ],
)
def test_what_says_something_else_is_left_alone(kind: type, dtype: torch.dtype) -> None:
    model = norm(kind, dtype)
    assert fuse_norms(model) == 0
    assert isinstance(model[0], kind)


def test_a_norm_of_another_dtype_than_the_models_is_left_alone() -> None:
    model = tiny("llama").bfloat16()
    model.model.norm.float()
    assert fuse_norms(model) == 2 * model.config.num_hidden_layers
    assert not isinstance(model.model.norm, FusedRMSNorm)


@pytest.mark.parametrize("x", [torch.zeros(3, 77), torch.zeros(3, 76, dtype=torch.bfloat16)])
def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    mine = norm(LlamaRMSNorm, torch.bfloat16)
    fuse_norms(mine)
    with pytest.raises(RuntimeError, match="one dtype"):
        mine(x)


def test_all_norms_of_a_llama_are_fused() -> None:
    model = tiny("llama")
    assert fuse_norms(model) == 2 * model.config.num_hidden_layers + 1
    assert fuse_norms(model) == 0, "again, and nothing changes"
    expected = tiny("llama")(torch.arange(9)[None]).logits
    assert torch.allclose(model(torch.arange(9)[None]).logits, expected, rtol=1e-4, atol=1e-4)
