"""Feed-forward layers in three operations say what transformers' say, and those of another kind are left alone."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from steer_ops import SILU_MUL
from steer_ops.layers import GatedMLP, fuse_mlps
from steer_ops.linears import pack_linears
from steering.sites import site_module
from steering.types import Site
from tests.server.test_architectures import tiny

pytestmark = pytest.mark.skipif(
    not SILU_MUL.has_kernel(torch.device("cpu"), torch.float32), reason="nothing can be compiled here"
)
SIZES = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 4}


SAME_AS_SILU = {"silu", "swish"}
SAME_AS_GELU = {"gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"}


def mlp(dtype: torch.dtype = torch.float32, *, activation: str = "silu", bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, hidden_act=activation, mlp_bias=bias)
    return nn.Sequential(LlamaMLP(config).to(dtype)).requires_grad_(False)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        ((1, 5, 48), "silu"),
        ((48,), "silu"),
        ((2, 0, 48), "silu"),
        ((1, 2000, 48), "silu"),
        ((1, 5, 48), "gelu_pytorch_tanh"),
        ((1, 2000, 48), "gelu_pytorch_tanh"),
    ],
)
def test_it_is_the_layer_of_llama(
    dtype: torch.dtype, shape: tuple[int, ...], activation: str, bias: bool, native: bool
) -> None:
    own, mine = (mlp(dtype, activation=activation, bias=bias) for _ in range(2))
    packed = pack_linears(mine, native=native) == 3  # not where oneDNN cannot compute with it
    assert fuse_mlps(mine) == packed
    assert isinstance(mine[0], GatedMLP) is packed
    x = (30 * torch.randn(shape)).to(dtype)  # gates of all sizes
    found, expected = mine(x), own(x)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert (found - expected).float().norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.float().norm()


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_the_ends_of_what_a_gate_can_be(activation: str) -> None:
    holder = mlp(activation=activation)
    pack_linears(holder)
    own = holder[0].act_fn
    fuse_mlps(holder)
    gates = torch.tensor([-torch.inf, -3e38, -200.0, -88.0, -1e-30, 0.0, 88.0, 200.0, 3e38, torch.inf, torch.nan])
    holder[0].gate_up_proj = nn.Identity()
    holder[0].down_proj = nn.Identity()
    found, expected = holder(torch.cat([gates, torch.ones_like(gates)])), own(gates)
    same = torch.isclose(found, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert same[1:].all(), (found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [name for name in ACT2FN if name not in {*SAME_AS_SILU, *SAME_AS_GELU, "prelu"}])
def test_another_activation_is_left_alone(activation: str, dtype: torch.dtype) -> None:
    holder = mlp(dtype, activation=activation)
    pack_linears(holder)
    assert fuse_mlps(holder) == 0
    assert isinstance(holder[0], LlamaMLP)


def test_layers_that_are_not_packed_are_left_alone() -> None:
    assert fuse_mlps(mlp()) == 0
    half = mlp(torch.float16)
    pack_linears(half)
    assert fuse_mlps(half) == 0


class Clamped(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-1, 1)


class ClampedFarOut(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.up_proj(x).clamp(-10, 10), self.gate_proj(x).clamp(max=10)
        return self.down_proj(self.act_fn(gate) * up)


class Routed(LlamaMLP):
    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return weights * super().forward(x)


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize("kind", [Clamped, ClampedFarOut, Routed])
def test_a_layer_that_does_more_is_left_alone(kind: type, size: float) -> None:
    holder = nn.Sequential(kind(LlamaConfig(**SIZES))).requires_grad_(False)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, 0, size)
    pack_linears(holder)
    assert fuse_mlps(holder) == 0
    assert isinstance(holder[0], kind)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("llama", 3), ("qwen3", 3), ("granite", 3), ("phi3", 3), ("gemma2", 3), ("gemma3", 3), ("gpt2", 0)],
)
def test_a_model_says_the_same_and_has_the_same_sites(name: str, fused: int) -> None:
    plain, model = tiny(name), tiny(name)
    pack_linears(model)
    assert fuse_mlps(model) == fused
    assert fuse_mlps(model) == 0, "again, and nothing changes"
    ids = torch.randint(3, 60, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-3)
    module, side = site_module(model, Site.parse("1.mlp_output"))
    assert side == "output"
    assert isinstance(module, GatedMLP) == bool(fused)
