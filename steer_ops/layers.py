"""Layers of a Hugging Face model, exchanged in place for layers that compute the same faster.

Linear layers with the same input become one product, and on a CPU they get their weights laid out once
(`steer_ops.linears`). RMS norms become one operation instead of seven, gated feed-forward layers three instead of five,
rotary embeddings of queries and keys none instead of sixteen: they are left to the attention, which turns what it
reads. On CUDA also additions to the residual stream and the norms after them become one each.

Each layer is exchanged by itself, after what is to take its place has been tried against it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from steer_ops.linears import (
    JoinedLinear,
    Product,
    agreed,
    all_have,
    is_close,
    is_product,
    pack_linears,
    place_of,
    tell_refused,
)
from steer_ops.ops import ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL
from steer_ops.registry import Op

EPSILONS = ("variance_epsilon", "eps")  # what models call the epsilon of an RMS norm
# The parts of a decoder layer that adds to the residual stream twice: what a norm and a sub-layer make of it, or, as
# Gemma 2 and 3 do, what another norm makes of that.
RESIDUAL_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
SANDWICHED_LAYER = RESIDUAL_LAYER | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
GATES = (SILU_MUL, GELU_TANH_MUL)
ACTIVATIONS = ("act_fn", "activation_fn")  # what models call the activation of a gated feed-forward layer
NORMED = "_steer_ops_normed"  # the attribute of a tensor that says what a norm makes of it
CACHES = ("past_key_values", "layer_past")  # and the cache that they give their attention
Function = TypeVar("Function", bound=Callable[..., Any])
# The output [N, out] of one product -> queries, keys and values, [N, heads, head_dim] each.
Split = Callable[[Tensor], tuple[Tensor, ...]]


def exchange_layers(model: Any, *, native: bool = True) -> None:
    """In place, on a CPU and on one CUDA device. `native`: also by kernels of ours, where they can be had; on CUDA
    nothing is done without. Each exchange is tried on random numbers first; where that shows a difference, the layer
    stays and the log says so."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return  # accelerate brings each layer its input from another device
    pack_linears(model, native=native)
    if native:
        fuse_norms(model)
        fuse_mlps(model)
        fuse_attention(model)
        fuse_residuals(model)


class FusedRMSNorm(nn.Module):
    """x [..., D] -> [..., D], as the many RMS norms in transformers have it, by the kernel `rms_norm`."""

    def __init__(self, weight: Tensor, epsilon: float, dtype: torch.dtype) -> None:
        """weight [D]: of x's `dtype`, which has a kernel, or float32 (`steer_ops.rms_norm`)."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.variance_epsilon, self.dtype = epsilon, dtype
        self._op = RMS_NORM.choose(weight.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        norm, known = x.__dict__.pop(NORMED, (None, None))
        found: Tensor = known if norm is self else self._op(x, self.weight, self.variance_epsilon)
        return found

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in one operation with what `forward` gives for that very tensor. Where there is a kernel
        `add_rms_norm`."""
        total: Tensor
        if self._forward_pre_hooks:  # they may change what it is given
            total = x + y
            return total
        total, normed = ADD_RMS_NORM.for_tensor(x)(x, y, self.weight, self.variance_epsilon)
        total.__dict__[NORMED] = self, normed  # it goes with the tensor, whether it is asked for or not
        return total


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), x [..., in] -> [..., out], as LlamaMLP and its many copies in transformers have it,
    by a kernel for their activation."""

    def __init__(self, gate_up: Product, down: nn.Module, gate: Op) -> None:
        """`gate_up`: gates and ups side by side, [..., in] -> [..., 2 * width], of a dtype that has a kernel of `gate`,
        one of `GATES`."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self._op = gate.choose(*place_of(gate_up))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self._op(self.gate_up_proj(x)))
        return found


def takes_rotary(attend: Function) -> Function:
    """Marks an attention of transformers' `AttentionInterface` that turns queries and keys itself, where it is given
    `rotary`: cosines and sines, [N, turned] each (`steer_ops.rotary`)."""
    attend.takes_rotary = True  # type: ignore[attr-defined]
    return attend


class RotaryAttention(nn.Module):
    """An attention layer with rotary embeddings, as LlamaAttention and its many copies in transformers, Phi3Attention
    and GPTNeoXAttention have it: one product for queries, keys and values, norms of their heads where the layer has
    them, then the attention that the model's configuration names, which `takes_rotary`. The layer whose place it takes
    still answers what it does not know: several texts, a cache, another attention."""

    def __init__(self, own: Any, whole: Product, split: Split, options: dict[str, Any]) -> None:
        """`own`: the layer, its projections joined (`pack_linears`). `whole` and `split`: its product for queries, keys
        and values, and how they lie in it. `options`: what it gives its attention by name."""
        super().__init__()
        self.config, self.layer_idx, self.head_dim = own.config, own.layer_idx, head_dim(own)
        for name, child in own.named_children():
            self.add_module(name, child)
        self._own = (own,)  # in a tuple: its modules are this one's
        self._whole, self._split = (whole,), split
        self._out = (output_projection(own),)
        self._norms = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        self._options = options
        self.turned, self._dtype = turned_width(own), place_of(whole)[1]

    @property
    def whole(self) -> Product:
        """The product for queries, keys and values."""
        return self._whole[0]

    def forward(
        self,
        hidden_states: Tensor,
        *others: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """hidden_states [1, N, D], position_embeddings (cosines and sines) [1, N, turned] each -> [1, N, D], and what
        else the attention says."""
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        tokens = hidden_states.shape[1]
        if (
            others
            or attend is None
            or not getattr(attend, "takes_rotary", False)
            or any(options.get(name) is not None for name in CACHES)
            or position_embeddings is None
            or len(hidden_states) != 1
            or position_embeddings[0].shape != (1, tokens, self.turned)
            or position_embeddings[0].dtype != self._dtype
        ):
            named = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, **options}
            return self._own[0](hidden_states, *others, **named)
        query, key, value = self._split(self.whole(hidden_states)[0])
        if self._norms[0] is not None and self._norms[1] is not None:
            query, key = self._norms[0](query), self._norms[1](key)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        options = {name: option for name, option in options.items() if name not in CACHES}
        named = {**self._options, **options, "rotary": (position_embeddings[0][0], position_embeddings[1][0])}
        found, weights = attend(self._own[0], query, key, value, attention_mask, **named)
        return self._out[0](found.reshape(1, tokens, -1)), weights


def head_dim(attention: Any) -> int:
    """How wide a head of an attention layer is."""
    return int(attention.head_dim if hasattr(attention, "head_dim") else attention.head_size)


def output_projection(attention: Any) -> nn.Module:
    """What brings the heads of an attention layer together."""
    found: nn.Module = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    return found


def _queries_keys_values(attention: Any) -> tuple[Product, Split] | None:
    """The one product of an attention layer, and how its output falls apart; None: it has several, or none is known."""
    query, whole, by_head = (getattr(attention, name, None) for name in ("q_proj", "qkv_proj", "query_key_value"))
    if isinstance(query, JoinedLinear):
        widths = [query.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        return query.whole, partial(_split_side_by_side, widths=widths, width=head_dim(attention))
    if is_product(whole):  # Phi-3
        queries: Any = output_projection(attention).in_features
        widths = [queries, *[(whole.out_features - queries) // 2] * 2]
        return whole, partial(_split_side_by_side, widths=widths, width=head_dim(attention))
    if is_product(by_head):  # GPT-NeoX
        return by_head, partial(_split_by_head, width=head_dim(attention))
    return None


def _split_side_by_side(product: Tensor, widths: list[int], width: int) -> tuple[Tensor, ...]:
    """All queries, then all keys, then all values."""
    return tuple(part.view(len(product), -1, width) for part in torch.split(product, widths, dim=-1))


def _split_by_head(product: Tensor, width: int) -> tuple[Tensor, ...]:
    """Query, key and value of each head side by side."""
    return product.view(len(product), -1, 3, width).unbind(2)


def fuse_norms(model: Any) -> int:
    """Replaces the RMS norms of a model, in place, by what says the same on numbers drawn at random; says how many:
    none where nothing can be compiled. Norms of another dtype than the model's stay."""
    fused, refused, dtype = 0, Counter[str](), getattr(model, "dtype", None)
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                epsilon = next((getattr(child, name) for name in EPSILONS if hasattr(child, name)), None)
                if epsilon is None or not _is_norm(child, dtype):
                    continue
                weight = child.weight
                candidates = (FusedRMSNorm(one, epsilon, weight.dtype) for one in _norm_weights(weight))
                found = next((one for one in candidates if agreed(_is_same_norm(one, child), weight.device)), None)
                if found is not None:
                    setattr(parent, name, found)
                    fused += 1
                else:
                    refused[type(child).__name__] += 1
    tell_refused(refused, "the fused norm")
    return fused


def _is_norm(layer: Any, dtype: torch.dtype | None) -> bool:
    weight = getattr(layer, "weight", None)
    if isinstance(layer, FusedRMSNorm) or not type(layer).__name__.endswith("RMSNorm") or weight is None:
        return False
    return weight.dim() == 1 and dtype in (None, weight.dtype) and all_have(RMS_NORM, weight.device, weight.dtype)


def _norm_weights(weight: Tensor) -> Iterator[Tensor]:
    """What norms with such a weight scale by: Llama's, those that round once as OLMo 2's, and Gemma's."""
    yield weight
    if weight.dtype != torch.float32:
        yield weight.float()
    yield 1 + weight.float()


def _is_same_norm(mine: FusedRMSNorm, own: Any) -> bool:
    """In half precision bit for bit, but where the two sums of squares are rounded differently."""
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(16, len(mine.weight), generator=random).to(mine.weight.device, mine.dtype)
    try:
        found, expected = mine(x), own(x)
    except Exception:  # it wants more than x, or another shape
        return False
    if not isinstance(expected, Tensor) or (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return float((found == expected).float().mean()) > 0.99


def fuse_mlps(model: Any) -> int:
    """Replaces the gated feed-forward layers of a model whose linear layers have been packed, in place, by what says
    the same on numbers drawn at random; says how many: none where nothing can be compiled."""
    fused, refused = 0, Counter[str]()
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                activation = next((getattr(child, name) for name in ACTIVATIONS if hasattr(child, name)), None)
                whole = _gates_and_ups(child)
                if whole is None or activation is None or not hasattr(child, "down_proj"):
                    continue
                here = place_of(whole)
                gates = [op for op in GATES if all_have(op, *here)]
                if not gates:
                    continue
                gate = next((op for op in gates if agreed(_is_gate(op, activation, *here), here[0])), None)
                found = GatedMLP(whole, child.down_proj, gate) if gate else None
                if found and agreed(_is_same_mlp(found, child), here[0]):
                    setattr(parent, name, found)
                    fused += 1
                else:
                    refused[type(child).__name__] += 1
    tell_refused(refused, "the fused gate")
    return fused


def _gates_and_ups(mlp: Any) -> Product | None:
    """The one product of a gated feed-forward layer; None: it has several, or none is known."""
    if isinstance(gate := getattr(mlp, "gate_proj", None), JoinedLinear):
        return gate.whole
    whole = getattr(mlp, "gate_up_proj", None)  # Phi-3
    return whole if is_product(whole) else None


def _is_gate(gate: Op, activation: Any, device: torch.device, dtype: torch.dtype) -> bool:
    x = torch.linspace(-20, 20, 1000).to(device, dtype)
    found = gate.choose(device, dtype)(torch.cat([x, torch.ones_like(x)]))
    return torch.allclose(found, activation(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def _is_same_mlp(mine: GatedMLP, own: Any) -> bool:
    """On tokens of all sizes, for some layers clamp what is large; each by itself. One pass: at the start of a large
    model every pass counts."""
    device, dtype = place_of(mine.gate_up_proj)
    largest = 2 if dtype == torch.float16 else 4  # sizes that stay finite
    sizes = torch.tensor([1, 30, 1e3, 1e5][:largest]).repeat(2)[:, None]
    random = torch.Generator().manual_seed(0)
    x = (sizes * torch.randn(len(sizes), mine.gate_up_proj.in_features, generator=random)).to(device, dtype)
    try:
        found, expected = mine(x), own(x)
    except Exception:  # it wants more than x, or its layers do not go together like that
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return is_close(found, expected)


_TRIAL = "steer_ops_trial"  # an attention that gives every query back


def fuse_attention(model: Any) -> int:
    """Replaces the attention layers of a model whose linear layers have been packed, in place, by what gives the same
    queries, keys and values to its attention on numbers drawn at random; says how many: none where nothing can be
    compiled."""
    fused, refused = 0, Counter[str]()
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                product = None if isinstance(child, RotaryAttention) else _queries_keys_values(child)
                if product is None or not all_have(ROTARY, *(here := place_of(product[0]))):
                    continue
                found = _fused_attention(child, *product)
                if agreed(found is not None, here[0]):
                    setattr(parent, name, found)
                    fused += 1
                else:
                    refused[type(child).__name__] += 1
    tell_refused(refused, "the fused rotary embedding")
    return fused


def turned_width(attention: Any) -> int:
    """How many numbers of each head an attention layer turns, as its configuration has it."""
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    return int(head_dim(attention) * (parameters.get("partial_rotary_factor") or 1.0))


def _fused_attention(own: Any, whole: Product, split: Split) -> RotaryAttention | None:
    """None: the layer does something else."""
    try:
        with _recorded_attention(own.config) as seen:
            x, given = _attention_inputs(turned_width(own), whole)
            expected = own(x, **given)
            mine = RotaryAttention(own, whole, split, seen[0][3])
            found = mine(x, **given)
            large = x * (30 if x.dtype == torch.float16 else 1e3)  # some layers clamp what is large
            own(large, **given)
            mine(large, **given)
    except Exception:  # it is called with something else, or is put together in another way
        return None
    if len(seen) != 4 or len(found) != len(expected):
        return None
    both = [(found[0], expected[0])]
    for ours, theirs in ((seen[1], seen[0]), (seen[3], seen[2])):
        both += zip(ours[:3], theirs[:3], strict=True)
    same = all(one.shape == other.shape and is_close(one, other) for one, other in both)
    return mine if same else None


def _attention_inputs(turned: int, whole: Product) -> tuple[Tensor, dict[str, Any]]:
    """Five tokens drawn at random, [1, 5, in], and what models give their attention by name."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, whole.in_features, generator=random).to(*place_of(whole))
    angles = torch.randn(1, 5, turned // 2, generator=random).repeat(1, 1, 2)
    turns = angles.cos().to(x), angles.sin().to(x)
    return x, {"position_embeddings": turns, "attention_mask": None}


@contextmanager
def _recorded_attention(config: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Attention gives every query back, turned where it is asked to; what it was called with is in the list: query and
    key, turned, value, options."""
    seen: list[tuple[Any, ...]] = []

    @takes_rotary
    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, rotary: Any = None, **options: Any
    ) -> tuple[Tensor, None]:
        if rotary is not None:
            turned = ROTARY.for_tensor(query)(query[0].transpose(0, 1), key[0].transpose(0, 1), *rotary)
            query, key = (part.transpose(0, 1)[None] for part in turned)
        seen.append((query, key, value, options))
        return query.transpose(1, 2), None

    chosen = config._attn_implementation
    AttentionInterface.register(_TRIAL, record)
    try:
        config._attn_implementation = _TRIAL
        yield seen
    finally:
        config._attn_implementation = chosen


def fuse_residuals(model: Any) -> int:
    """Has the decoder layers of a model whose attention has been fused add each sub-layer's output to the residual
    stream and take the norm after that in one operation, where that says the same on numbers drawn at random; says how
    many: none where there is no kernel. The layers stay the modules that they are, with their hooks."""
    fused, refused = 0, Counter[str]()
    following = _norms_after(model)
    with torch.no_grad():
        for layer in model.modules():
            if not _can_fuse_residual(layer):
                continue
            if forward := _fused_residual(layer, following.get(layer)):
                layer.forward = forward
                fused += 1
            else:
                refused[type(layer).__name__] += 1
    tell_refused(refused, "the fused residual addition")
    return fused


def _norms_after(model: Any) -> dict[nn.Module, tuple[nn.Module, FusedRMSNorm]]:
    """Of each decoder layer the module that is given its output, and the norm of that: the next layer and its first
    norm, or the model's last norm. Where a norm is given something else, it computes that anew."""
    found = {}
    for parent in model.modules():
        for layers in parent.children():
            if isinstance(layers, nn.ModuleList) and len(layers):
                for layer, after in zip(layers, [*layers[1:], getattr(parent, "norm", None)], strict=True):
                    norm = getattr(after, "input_layernorm", after)
                    if isinstance(norm, FusedRMSNorm):
                        found[layer] = after, norm
    return found


def _norm_before_mlp(layer: Any) -> Any:
    return getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)


def _can_fuse_residual(layer: Any) -> bool:
    parts = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
    if parts not in (RESIDUAL_LAYER, SANDWICHED_LAYER) or "forward" in vars(layer):
        return False
    attention, norm = layer.self_attn, _norm_before_mlp(layer)
    if not isinstance(attention, RotaryAttention) or not isinstance(norm, FusedRMSNorm):
        return False
    device, dtype = place_of(attention.whole)
    return norm.dtype == dtype and all_have(ADD_RMS_NORM, device, dtype)


def _fused_residual(layer: Any, after: tuple[nn.Module, FusedRMSNorm] | None) -> Callable[..., Tensor] | None:
    """None: the layer does something else. after: see `_norms_after`."""
    attention = layer.self_attn
    device, dtype = place_of(attention.whole)
    if after and after[1].dtype != dtype:
        after = None
    forward = partial(_forward_residual, layer, after)
    try:
        with _recorded_attention(attention.config):
            x, given = _attention_inputs(attention.turned, attention.whole)
            expected, found = layer(x, **given), forward(x, **given)
            same = isinstance(expected, Tensor) and expected.shape == found.shape and is_close(found, expected)
            same = same and (not after or is_close(after[1](found), after[1](expected)))
    except Exception:  # it is called with something else
        same = False
    return forward if agreed(same, device) else None


def _forward_residual(
    layer: Any, after: tuple[nn.Module, FusedRMSNorm] | None, hidden_states: Tensor, **options: Any
) -> Tensor:
    """[..., D] -> [..., D]"""
    norm = _norm_before_mlp(layer)
    sandwiched = norm is not layer.post_attention_layernorm
    found, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    if sandwiched:
        found = layer.post_attention_layernorm(found)
    hidden_states = norm.add(found, hidden_states)
    found = layer.mlp(norm(hidden_states))
    if sandwiched:
        found = layer.post_feedforward_layernorm(found)
    if after is None or layer._forward_hooks or after[0]._forward_pre_hooks:  # they may change what the norm is given
        added: Tensor = hidden_states + found
        return added
    return after[1].add(found, hidden_states)
