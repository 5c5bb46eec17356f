"""Layers of a Hugging Face model, exchanged in place for layers that compute the same faster.

Linear layers with the same input become one product. On a CPU linear layers get their weights laid out once: in tiles
for a kernel of ours, or as oneDNN wants them. PyTorch's own `linear` lays the weight out anew in every call, which for
the few tokens of a decoding step takes longer than the product. RMS norms become one operation instead of seven, gated
feed-forward layers three instead of five, rotary embeddings of queries and keys none instead of sixteen: they are left
to the attention, which turns what it reads. On CUDA also the addition of an attention's output and the norm after it
become one.

Each layer is exchanged by itself, after what is to take its place has been tried against it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from steer_ops.cpu.build import cpu_flags
from steer_ops.cuda.library import DTYPES as CUDA_DTYPES
from steer_ops.ops import ADD_RMS_NORM, RMS_NORM, ROTARY, SILU_MUL, TILED_LINEAR, UNIT_BYTES, tiled
from steer_ops.plain import untiled
from steer_ops.registry import DTYPES

# Layers that are given the same input, in the order in which models call them: one product for all of them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EPSILONS = ("variance_epsilon", "eps")  # what models call the epsilon of an RMS norm
# The parts of a decoder layer that adds to the residual stream twice: what a norm and a sub-layer make of it.
RESIDUAL_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
CPU = torch.device("cpu")
Function = TypeVar("Function", bound=Callable[..., Any])
log = logging.getLogger(__name__)


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


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out], by oneDNN."""

    device = CPU

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        """Whether oneDNN computes with it on this CPU: bfloat16 needs AVX-512 or newer."""
        if dtype not in DTYPES:
            return False
        return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    @property
    def weight(self) -> Tensor:
        """A plain copy, [out, in]."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return found


class TiledLinear(nn.Module):
    """x [..., in] -> [..., out], by the kernel `tiled_linear`: as fast as the weight is read, for a few tokens.

    oneDNN takes 15 to 35 microseconds a call before it computes anything and reads a weight at two thirds of the
    memory's speed. It stays on CPUs without AVX2, and in bfloat16 where there is AMX.
    """

    device = CPU

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in], for which `takes` is true."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = None if bias is None else bias.detach().contiguous()
        self._tiles = tiled(weight.detach())
        self._op = TILED_LINEAR.choose(CPU, weight.dtype)

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether there is a kernel for this weight [out, in] on this CPU."""
        if weight.dtype not in DTYPES or weight.shape[1] * weight.itemsize % UNIT_BYTES:
            return False
        if weight.dtype == torch.bfloat16 and "amx_bf16" in cpu_flags():
            return False
        return TILED_LINEAR.has_kernel(CPU, weight.dtype)

    @property
    def weight(self) -> Tensor:
        """A plain copy, [out, in]."""
        return untiled(self._tiles, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._op(x, self._tiles, self.bias, self.out_features)
        return found


class DenseLinear(nn.Module):
    """x [..., in] -> [..., out], as PyTorch computes it on CUDA: for several layers' weights in one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


Packed = PackedLinear | TiledLinear | DenseLinear


class JoinedLinear(nn.Module):
    """One of several layers whose weights lie in one packed layer: the first of them computes the outputs of all, and
    the others take theirs, as long as they are given the very same tensor."""

    def __init__(self, whole: Packed, pending: list[tuple[Tensor, Tensor]], start: int, stop: int) -> None:
        """`pending`: the input and the outputs that the layers of one `whole` have in common, at most one pair."""
        super().__init__()
        self.in_features, self.out_features = whole.in_features, stop - start
        self._whole = (whole,)  # in a tuple: it is not a module of the model
        self._pending = pending
        self._start, self._stop = start, stop

    @property
    def whole(self) -> Packed:
        """The layer that has all the weights."""
        return self._whole[0]

    @property
    def bias(self) -> Tensor | None:
        whole = self._whole[0].bias
        return None if whole is None else whole[self._start : self._stop]

    @property
    def weight(self) -> Tensor:
        """A plain copy, [out, in]."""
        return self._whole[0].weight[self._start : self._stop]

    def forward(self, x: Tensor) -> Tensor:
        whole = self._whole[0]
        if self._start == 0 or not self._pending or self._pending[0][0] is not x:
            self._pending[:] = [(x, whole(x))]
        found = self._pending[0][1][..., self._start : self._stop]
        if self._stop == whole.out_features:
            self._pending.clear()
        return found


class FusedRMSNorm(nn.Module):
    """x [..., D] -> [..., D], as LlamaRMSNorm and its many copies in transformers have it, by the kernel `rms_norm`."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        """weight [D], of a dtype that has a kernel."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.variance_epsilon = epsilon
        self._op = RMS_NORM.choose(weight.device, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._op(x, self.weight, self.variance_epsilon)
        return found


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), x [..., in] -> [..., out], as LlamaMLP and its many copies in transformers have it,
    by the kernel `silu_mul`."""

    def __init__(self, gate_up: Packed, down: nn.Module) -> None:
        """`gate_up`: gates and ups side by side, [..., in] -> [..., 2 * width], of a dtype that has a kernel."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self._op = SILU_MUL.choose(gate_up.device, gate_up.dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self._op(self.gate_up_proj(x)))
        return found


def takes_rotary(attend: Function) -> Function:
    """Marks an attention of transformers' `AttentionInterface` that turns queries and keys itself, where it is given
    `rotary`: cosines and sines, [N, turned] each (`steer_ops.rotary`)."""
    attend.takes_rotary = True  # type: ignore[attr-defined]
    return attend


class RotaryAttention(nn.Module):
    """An attention layer with rotary embeddings, as LlamaAttention and its many copies in transformers have it: one
    product for queries, keys and values, norms of their heads where the layer has them, then the attention that the
    model's configuration names, which `takes_rotary`. The layer whose place it takes still answers what it does not
    know: several texts, a cache, another attention."""

    o_proj: nn.Module

    def __init__(self, own: Any, options: dict[str, Any]) -> None:
        """`own`: the layer, its projections joined (`pack_linears`). `options`: what it gives its attention by name."""
        super().__init__()
        self.config, self.layer_idx, self.head_dim = own.config, own.layer_idx, own.head_dim
        for name, child in own.named_children():
            self.add_module(name, child)
        self._own = (own,)  # in a tuple: its modules are this one's
        self._whole = (own.q_proj.whole,)
        self._widths = [own.q_proj.out_features, own.k_proj.out_features, own.v_proj.out_features]
        self._norms = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        self._options = options
        self.turned = turned_width(own)

    @property
    def whole(self) -> Packed:
        """The product for queries, keys and values."""
        whole: Packed = self._whole[0]
        return whole

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """hidden_states [1, N, D], position_embeddings (cosines and sines) [1, N, turned] each -> [1, N, D], and what
        else the attention says."""
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        tokens = hidden_states.shape[1]
        if (
            attend is None
            or not getattr(attend, "takes_rotary", False)
            or past_key_values is not None
            or position_embeddings is None
            or len(hidden_states) != 1
            or position_embeddings[0].shape != (1, tokens, self.turned)
            or position_embeddings[0].dtype != self.whole.dtype
        ):
            return self._own[0](
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **options,
            )
        parts = self.whole(hidden_states)[0].split(self._widths, dim=-1)
        query, key, value = (part.view(tokens, -1, self.head_dim) for part in parts)
        if self._norms[0] is not None and self._norms[1] is not None:
            query, key = self._norms[0](query), self._norms[1](key)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        named = {**self._options, **options, "rotary": (position_embeddings[0][0], position_embeddings[1][0])}
        found, weights = attend(self._own[0], query, key, value, attention_mask, **named)
        return self.o_proj(found.reshape(1, tokens, -1)), weights


def pack_linears(model: Any, *, native: bool = True) -> int:
    """Replaces the linear layers of a model on a CPU, in place, where oneDNN or a kernel of ours takes them, and on
    CUDA those that become one product; says how many. Weights that nobody else holds are freed. `native`: by kernels of
    ours, where they can be had; on CUDA nothing is replaced without. Layers stay whose outputs for a token drawn at
    random come out otherwise."""
    packed, refused = 0, Counter[str]()
    with torch.no_grad():
        for parent in list(model.modules()):
            plain = {name: child for name, child in parent.named_children() if _can_pack(child, native)}
            for names in TOGETHER:
                if set(names) <= plain.keys() and len({plain[name].bias is None for name in names}) == 1:
                    own = {name: plain.pop(name) for name in names}
                    packed += _exchange(parent, own, _joined(own, native), refused)
            for name, child in plain.items():
                if child.weight.device == CPU:
                    found = _packed(_weight(child), child.bias, native)
                    packed += _exchange(parent, {name: child}, {name: found}, refused)
    _tell(refused, "the packed product")
    return packed


def _exchange(parent: nn.Module, own: dict[str, Any], mine: Mapping[str, nn.Module], refused: Counter[str]) -> int:
    """Puts linear layers in the place of others, if they compute the same; says how many."""
    if not _is_same_product(list(own.values()), list(mine.values())):
        refused.update(type(layer).__name__ for layer in own.values())
        return 0
    for name, layer in mine.items():
        setattr(parent, name, layer)
    return len(mine)


def _is_same_product(own: list[Any], mine: list[nn.Module]) -> bool:
    """For a token drawn at random."""
    weight = _weight(own[0])
    x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        return all(_is_close(one(x), other(x)) for one, other in zip(mine, own, strict=True))
    except Exception:  # what replaces it does not take what it takes
        return False


def _tell(refused: Counter[str], what: str) -> None:
    """refused: how many layers of each class stay as they are."""
    for kind, count in refused.items():
        log.info("%d layers %s stay as they are: %s computes something else", count, kind, what)


def _packed(weight: Tensor, bias: Tensor | None, native: bool) -> Packed:
    """weight [out, in]"""
    if weight.device != CPU:
        return DenseLinear(weight, bias)
    return TiledLinear(weight, bias) if native and TiledLinear.takes(weight) else PackedLinear(weight, bias)


def _can_pack(layer: Any, native: bool) -> bool:
    if type(layer) not in (nn.Linear, Conv1D) or "forward" in vars(layer):  # it computes something else
        return False
    weight = _weight(layer)
    if weight.device.type == "cuda":
        return native and weight.dtype in CUDA_DTYPES
    if weight.device != CPU:
        return False
    return _has_onednn() and (PackedLinear.takes(weight.dtype) or (native and TiledLinear.takes(weight)))


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def _weight(layer: Any) -> Tensor:
    """[out, in]"""
    weight: Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.T


def _joined(layers: dict[str, Any], native: bool) -> dict[str, JoinedLinear]:
    biases = [layer.bias for layer in layers.values() if layer.bias is not None]
    weight = torch.cat([_weight(layer) for layer in layers.values()])
    whole = _packed(weight, torch.cat(biases) if biases else None, native)
    pending: list[tuple[Tensor, Tensor]] = []
    stops = np.cumsum([0, *(_weight(layer).shape[0] for layer in layers.values())]).tolist()
    return {
        name: JoinedLinear(whole, pending, start, stop)
        for name, start, stop in zip(layers, stops, stops[1:], strict=False)
    }


def fuse_norms(model: Any) -> int:
    """Replaces the RMS norms of a model, in place, by what says the same on numbers drawn at random; says how many:
    none where nothing can be compiled. Norms of another dtype than the model's stay."""
    fused, refused, dtype = 0, Counter[str](), getattr(model, "dtype", None)
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                found = _fused_norm(child)
                if found is None or found.weight.dtype != (dtype or found.weight.dtype):
                    continue
                if _is_same_norm(found, child):
                    setattr(parent, name, found)
                    fused += 1
                else:
                    refused[type(child).__name__] += 1
    _tell(refused, "the fused norm")
    return fused


def _fused_norm(norm: Any) -> FusedRMSNorm | None:
    epsilon = next((getattr(norm, name) for name in EPSILONS if hasattr(norm, name)), None)
    weight = getattr(norm, "weight", None)
    if not type(norm).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
        return None
    if weight.dim() != 1 or not RMS_NORM.has_kernel(weight.device, weight.dtype):
        return None
    return FusedRMSNorm(weight, epsilon)


def _is_same_norm(mine: FusedRMSNorm, own: Any) -> bool:
    """In half precision bit for bit, but where the two sums of squares are rounded differently."""
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(16, mine.weight.shape[0], generator=random).to(mine.weight)
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
                gate, activation = getattr(child, "gate_proj", None), getattr(child, "act_fn", None)
                if not isinstance(gate, JoinedLinear) or activation is None or not hasattr(child, "down_proj"):
                    continue
                here = gate.whole.device, gate.whole.dtype
                if not SILU_MUL.has_kernel(*here):
                    continue
                found = GatedMLP(gate.whole, child.down_proj)
                if _is_silu(activation, *here) and _is_same_mlp(found, child, gate):
                    setattr(parent, name, found)
                    fused += 1
                else:
                    refused[type(child).__name__] += 1
    _tell(refused, "the fused gate")
    return fused


def _is_silu(activation: Any, device: torch.device, dtype: torch.dtype) -> bool:
    x = torch.linspace(-20, 20, 1000).to(device, dtype)
    found = SILU_MUL.choose(device, dtype)(torch.cat([x, torch.ones_like(x)]))
    return torch.allclose(found, activation(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def _is_same_mlp(mine: GatedMLP, own: Any, gate: JoinedLinear) -> bool:
    """On tokens of all sizes, for some layers clamp what is large; each by itself. One pass: at the start of a large
    model every pass counts."""
    largest = 2 if gate.whole.dtype == torch.float16 else 4  # sizes that stay finite
    sizes = torch.tensor([1, 30, 1e3, 1e5][:largest]).repeat(2)[:, None]
    random = torch.Generator().manual_seed(0)
    x = (sizes * torch.randn(len(sizes), gate.in_features, generator=random)).to(gate.whole.device, gate.whole.dtype)
    try:
        found, expected = mine(x), own(x)
    except Exception:  # it wants more than x, or its layers do not go together like that
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return _is_close(found, expected)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Every vector of the last dimension, to its own length."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    away = (found - expected).float().norm(dim=-1)
    return bool((away <= tolerance * expected.float().norm(dim=-1)).all())


_TRIAL = "steer_ops_trial"  # an attention that gives every query back


def fuse_attention(model: Any) -> int:
    """Replaces the attention layers of a model whose linear layers have been packed, in place, by what gives the same
    queries, keys and values to its attention on numbers drawn at random; says how many: none where nothing can be
    compiled."""
    fused, refused = 0, Counter[str]()
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                query = getattr(child, "q_proj", None)
                if not isinstance(query, JoinedLinear) or isinstance(child, RotaryAttention):
                    continue
                if not ROTARY.has_kernel(query.whole.device, query.whole.dtype):
                    continue
                if found := _fused_attention(child, query.whole):
                    setattr(parent, name, found)
                    fused += 1
                else:
                    refused[type(child).__name__] += 1
    _tell(refused, "the fused rotary embedding")
    return fused


def turned_width(attention: Any) -> int:
    """How many numbers of each head an attention layer turns, as its configuration has it."""
    parameters = getattr(attention.config, "rope_parameters", None) or {}
    return int(attention.head_dim * (parameters.get("partial_rotary_factor") or 1.0))


def _fused_attention(own: Any, whole: Packed) -> RotaryAttention | None:
    """None: the layer does something else."""
    try:
        with _recorded_attention(own.config) as seen:
            x, given = _attention_inputs(turned_width(own), whole)
            expected = own(x, **given)
            mine = RotaryAttention(own, seen[0][3])
            found = mine(x, **given)
            large = x * (30 if whole.dtype == torch.float16 else 1e3)  # some layers clamp what is large
            own(large, **given)
            mine(large, **given)
    except Exception:  # it is called with something else, or is put together in another way
        return None
    if len(seen) != 4 or len(found) != len(expected):
        return None
    both = [(found[0], expected[0])]
    for ours, theirs in ((seen[1], seen[0]), (seen[3], seen[2])):
        both += zip(ours[:3], theirs[:3], strict=True)
    same = all(one.shape == other.shape and _is_close(one, other) for one, other in both)
    return mine if same else None


def _attention_inputs(turned: int, whole: Packed) -> tuple[Tensor, dict[str, Any]]:
    """Five tokens drawn at random, [1, 5, in], and what models give their attention by name."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, whole.in_features, generator=random).to(whole.device, whole.dtype)
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
    """Has the decoder layers of a model whose attention has been fused add the attention's output to the residual
    stream and take the norm of that in one operation, where that says the same on numbers drawn at random; says how
    many: none where there is no kernel. The layers stay the modules that they are, with their hooks."""
    fused, refused = 0, Counter[str]()
    with torch.no_grad():
        for layer in model.modules():
            if not _can_fuse_residual(layer):
                continue
            if _fuse_residual(layer):
                fused += 1
            else:
                refused[type(layer).__name__] += 1
    _tell(refused, "the fused residual addition")
    return fused


def _can_fuse_residual(layer: Any) -> bool:
    if {name for name, _ in layer.named_children()} != RESIDUAL_LAYER or "forward" in vars(layer):
        return False
    attention, norm = layer.self_attn, layer.post_attention_layernorm
    if not isinstance(attention, RotaryAttention) or not isinstance(norm, FusedRMSNorm):
        return False
    whole = attention.whole
    return norm.weight.dtype == whole.dtype and ADD_RMS_NORM.has_kernel(whole.device, whole.dtype)


def _fuse_residual(layer: Any) -> bool:
    attention = layer.self_attn
    whole = attention.whole
    forward = partial(_forward_residual, layer, ADD_RMS_NORM.choose(whole.device, whole.dtype))
    try:
        with _recorded_attention(attention.config):
            x, given = _attention_inputs(attention.turned, whole)
            expected, found = layer(x, **given), forward(x, **given)
    except Exception:  # it is called with something else
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape or not _is_close(found, expected):
        return False
    layer.forward = forward
    return True


def _forward_residual(layer: Any, add_rms_norm: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """[..., D] -> [..., D]"""
    norm = layer.post_attention_layernorm
    found, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    hidden_states, normed = add_rms_norm(found, hidden_states, norm.weight, norm.variance_epsilon)
    added: Tensor = hidden_states + layer.mlp(normed)
    return added
