"""What is exchanged on CUDA alone, with the references as the kernels: products joined, residual additions fused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steer_ops import ADD_RMS_NORM, RMS_NORM, ROTARY, SILU_MUL, linears
from steer_ops.layers import RotaryAttention, exchange_layers, fuse_residuals
from steer_ops.linears import DenseLinear, JoinedLinear
from steering.sites import site_module
from steering.types import Site
from tests.server.test_architectures import MORE, tiny
from tests.steer_ops import turning
from tests.steering.families import FAMILIES

IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (ADD_RMS_NORM, RMS_NORM, ROTARY, SILU_MUL):
        monkeypatch.setitem(op._chosen, ("cpu", torch.float32), lambda *args, reference=op.reference: reference(*args))
    monkeypatch.setattr(linears, "_packed", lambda weight, bias, native: DenseLinear(weight, bias))


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_family_says_what_it_said(name: str) -> None:
    model = tiny(name)
    exchange_layers(model)
    model.set_attn_implementation(turning.NAME)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, tiny(name)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("mistral", True), ("phi3", True), ("gemma2", False)],
)
def test_layers_of_the_usual_kind_add_and_norm_at_once(name: str, fused: bool) -> None:
    model = tiny(name)
    exchange_layers(model)
    assert all(("forward" in vars(layer)) is fused for layer in model.model.layers)
    assert fuse_residuals(model) == 0, "again, and nothing changes"


def test_a_layer_that_does_more_is_left_alone() -> None:
    model = tiny("llama")
    kind = type(model.model.layers[0])

    class Scaled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **named: Any) -> Any:
            return 2 * super().forward(*args, **named)

    model.model.layers[0].__class__ = Scaled
    exchange_layers(model)
    assert ["forward" in vars(layer) for layer in model.model.layers] == [False, True, True]


@pytest.mark.parametrize("site", ["1.residual", "1.attn_output", "1.mlp_output", "1.attn_heads"])
def test_what_hooks_change_reaches_the_logits_as_before(site: str) -> None:
    def change(module: Any, args: Any, output: Any = None) -> Any:
        given = args[0] if output is None else output
        if isinstance(given, Tensor):
            return (3 * given,) if output is None else 3 * given
        return (3 * given[0], *given[1:])

    found = []
    for exchanged in (True, False):
        model = tiny("llama")
        if exchanged:
            exchange_layers(model)
            model.set_attn_implementation(turning.NAME)
        module, side = site_module(model, Site.parse(site))
        if side == "input":
            module.register_forward_pre_hook(change)
        else:
            module.register_forward_hook(change)
        with torch.no_grad():
            found.append(model(IDS).logits)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


def test_joined_layers_share_one_weight_of_pytorchs() -> None:
    model = tiny("llama")
    weights = [
        layer.weight.clone() for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj)
    ]
    exchange_layers(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert isinstance(attention, RotaryAttention)
    assert isinstance(attention.q_proj, JoinedLinear)
    assert isinstance(attention.whole, DenseLinear)
    assert torch.equal(attention.q_proj.weight, weights[0])
    assert torch.equal(mlp.gate_up_proj.weight[mlp.gate_up_proj.out_features // 2 :], weights[1])


def test_a_model_over_several_devices_is_left_alone() -> None:
    model = tiny("llama")
    model.model.layers[2]._hf_hook = object()  # as accelerate marks what it moves inputs for
    before = [type(module) for module in model.modules()]
    exchange_layers(model)
    assert [type(module) for module in model.modules()] == before
