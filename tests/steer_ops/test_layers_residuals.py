"""What is exchanged on CUDA alone, with the references as the kernels: products joined, residual additions fused."""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_ops import ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL, linears
from steer_ops.layers import RotaryAttention, exchange_layers, fuse_residuals
from steer_ops.linears import DenseLinear, JoinedLinear
from steer_ops.registry import Op
from steering.sites import site_module
from steering.types import Site
from tests.server.test_architectures import MORE, tiny
from tests.steer_ops import turning
from tests.steering.families import FAMILIES

IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in (ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL):
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
    [
        ("llama", True),
        ("qwen2", True),
        ("qwen3", True),
        ("mistral", True),
        ("phi3", True),
        ("gemma2", True),
        ("gemma3", True),
        ("olmo2", False),
    ],
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


def logits(model: Any) -> Tensor:
    model.set_attn_implementation(turning.NAME)
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("name", "others"), [("llama", 0), ("qwen3", 6), ("gemma2", 6)])
def test_every_addition_to_the_residual_stream_is_one_with_the_norm_after_it(
    name: str, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three layers: what is left is the norm of the embeddings, those of heads, and of sub-layers' outputs."""
    counts = Counter[str]()

    def counted(op: Op) -> Any:
        def call(*args: Any) -> Any:
            counts[op.name] += 1
            return op.reference(*args)

        return call

    for op in (ADD_RMS_NORM, RMS_NORM):
        monkeypatch.setitem(op._chosen, ("cpu", torch.float32), counted(op))
    model = tiny(name)
    exchange_layers(model)
    counts.clear()
    logits(model)
    assert counts == {"add_rms_norm": 6, "rms_norm": 1 + others}
    handle = model.model.layers[1].register_forward_hook(lambda *args: None)
    counts.clear()
    logits(model)
    assert counts == {"add_rms_norm": 5, "rms_norm": 2 + others}, "a hook comes before the norm"
    handle.remove()


def in_place(module: Any, args: Any, output: Any = None) -> None:
    (args[0] if output is None else output).mul_(3)


def anew(module: Any, args: Any, output: Any = None) -> Any:
    return (3 * args[0],) if output is None else 3 * output


@pytest.mark.parametrize("change", [in_place, anew])
@pytest.mark.parametrize(("layer", "side"), [(0, "output"), (2, "output"), (1, "input")])
def test_a_hook_between_two_layers_changes_what_the_next_norm_is_given(layer: int, side: str, change: Any) -> None:
    model, other = tiny("llama"), tiny("llama")
    exchange_layers(model)
    expected = logits(model)
    for one in (model, other):
        at = one.model.layers[layer]
        at.register_forward_hook(change) if side == "output" else at.register_forward_pre_hook(change)
    with torch.no_grad():
        assert torch.allclose(logits(model), other(IDS).logits, rtol=1e-4, atol=1e-4)
    if layer < 2:  # the last norm knows no sizes
        assert not torch.allclose(logits(model), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("change", [in_place, anew])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_hook_on_a_norm_changes_what_it_is_given(norm: str, change: Any) -> None:
    model, other = tiny("llama"), tiny("llama")
    exchange_layers(model)
    for one in (model, other):
        getattr(one.model.layers[1], norm).register_forward_pre_hook(change)
    with torch.no_grad():
        assert torch.allclose(logits(model), other(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_list_without_layers_has_no_norms_after_them() -> None:
    model = tiny("llama")
    expected = logits(model)
    model.model.more = torch.nn.ModuleList()
    exchange_layers(model)
    assert torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_pass_that_ends_early_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the largest pass at the start does, after the first layer: what it leaves would be memory that is taken."""
    made: list[weakref.ref[Tensor]] = []

    def kept(*args: Any) -> Any:
        found = ADD_RMS_NORM.reference(*args)
        made.extend(map(weakref.ref, found))
        return found

    model = tiny("llama")
    monkeypatch.setitem(ADD_RMS_NORM._chosen, ("cpu", torch.float32), kept)
    exchange_layers(model)
    expected = logits(model)
    model.config.num_hidden_layers = 1
    logits(model)
    assert len(made) > 4
    assert not any(tensor() is not None for tensor in made)
    model.config.num_hidden_layers = 3
    assert torch.equal(logits(model), expected)


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
