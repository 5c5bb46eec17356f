"""Layers of a Hugging Face model on a CPU, exchanged in place for layers that compute the same faster.

Linear layers get their weights laid out once: in tiles for a kernel of ours, or as oneDNN wants them. PyTorch's own
`linear` lays the weight out anew in every call, which for the few tokens of a decoding step takes longer than the
product. RMS norms become one operation instead of seven, gated feed-forward layers three instead of five, rotary
embeddings of queries and keys one instead of sixteen.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from steer_ops.cpu.build import cpu_flags
from steer_ops.ops import RMS_NORM, ROTARY, SILU_MUL, TILED_LINEAR, UNIT_BYTES, tiled
from steer_ops.plain import untiled
from steer_ops.registry import DTYPES

# Layers that are given the same input, in the order in which models call them: one product for all of them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EPSILONS = ("variance_epsilon", "eps")  # what models call the epsilon of an RMS norm
CPU = torch.device("cpu")


def exchange_layers(model: Any, *, native: bool = True) -> None:
    """In place; does nothing to what is not on a CPU. `native`: also by compiled kernels, where they can be had. All
    but linear layers are tried on random numbers first, and left alone where that shows a difference."""
    pack_linears(model, native=native)
    if native:
        fuse_norms(model)
        fuse_mlps(model)
        fuse_attention(model)


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out], by oneDNN."""

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


Packed = PackedLinear | TiledLinear


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
        self._op = RMS_NORM.choose(CPU, weight.dtype)

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
        self._op = SILU_MUL.choose(CPU, gate_up.dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self._op(self.gate_up_proj(x)))
        return found


class RotaryAttention(nn.Module):
    """An attention layer with rotary embeddings, as LlamaAttention and its many copies in transformers have it: one
    product for queries, keys and values, norms of their heads where the layer has them, the kernel `rotary`, then the
    attention that the model's configuration names. The layer whose place it takes still answers what it does not
    know: several texts, a cache, an attention that has no name, embeddings of a part of each head."""

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
        self._op = ROTARY.choose(CPU, self._whole[0].dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        """hidden_states [1, N, D], position_embeddings (cosines and sines) [1, N, head_dim] each -> [1, N, D], and what
        else the attention says."""
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        tokens = hidden_states.shape[1]
        if (
            attend is None
            or past_key_values is not None
            or position_embeddings is None
            or len(hidden_states) != 1
            or position_embeddings[0].shape != (1, tokens, self.head_dim)
        ):
            return self._own[0](
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **options,
            )
        parts = self._whole[0](hidden_states)[0].split(self._widths, dim=-1)
        query, key, value = (part.view(tokens, -1, self.head_dim) for part in parts)
        if self._norms[0] is not None and self._norms[1] is not None:
            query, key = self._norms[0](query), self._norms[1](key)
        cos, sin = position_embeddings
        query, key = self._op(query, key, cos[0], sin[0])
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        found, weights = attend(self._own[0], query, key, value, attention_mask, **{**self._options, **options})
        return self.o_proj(found.reshape(1, tokens, -1)), weights


def pack_linears(model: Any, *, native: bool = True) -> int:
    """Replaces the linear layers of a model, in place; says how many: none where oneDNN is missing or the model is not
    on a CPU. Weights that nobody else holds are freed. `native`: by compiled kernels, where they can be had."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return 0
    packed = 0
    with torch.no_grad():
        for parent in list(model.modules()):
            plain = {name: child for name, child in parent.named_children() if _can_pack(child, native)}
            packed += len(plain)
            for names in TOGETHER:
                if set(names) <= plain.keys() and len({plain[name].bias is None for name in names}) == 1:
                    _join(parent, {name: plain.pop(name) for name in names}, native)
            for name, child in plain.items():
                setattr(parent, name, _packed(_weight(child), child.bias, native))
    return packed


def _packed(weight: Tensor, bias: Tensor | None, native: bool) -> Packed:
    """weight [out, in]"""
    return TiledLinear(weight, bias) if native and TiledLinear.takes(weight) else PackedLinear(weight, bias)


def _can_pack(layer: Any, native: bool) -> bool:
    # Only the classes themselves: a subclass computes something else.
    if type(layer) not in (nn.Linear, Conv1D) or layer.weight.device.type != "cpu" or layer.weight.dtype not in DTYPES:
        return False
    return PackedLinear.takes(layer.weight.dtype) or (native and TiledLinear.takes(_weight(layer)))


def _weight(layer: Any) -> Tensor:
    """[out, in]"""
    weight: Tensor = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.T


def _join(parent: nn.Module, layers: dict[str, Any], native: bool) -> None:
    biases = [layer.bias for layer in layers.values() if layer.bias is not None]
    weight = torch.cat([_weight(layer) for layer in layers.values()])
    whole = _packed(weight, torch.cat(biases) if biases else None, native)
    pending: list[tuple[Tensor, Tensor]] = []
    start = 0
    for name, layer in layers.items():
        stop = start + _weight(layer).shape[0]
        setattr(parent, name, JoinedLinear(whole, pending, start, stop))
        start = stop


def fuse_norms(model: Any) -> int:
    """Replaces the RMS norms of a model on a CPU, in place, by what says the same on numbers drawn at random; says how
    many: none where nothing can be compiled. Norms of another dtype than the model's stay."""
    fused, dtype = 0, getattr(model, "dtype", None)
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                found = _fused_norm(child)
                if found is None or found.weight.dtype != (dtype or found.weight.dtype):
                    continue
                if _is_same_norm(found, child):
                    setattr(parent, name, found)
                    fused += 1
    return fused


def _fused_norm(norm: Any) -> FusedRMSNorm | None:
    epsilon = next((getattr(norm, name) for name in EPSILONS if hasattr(norm, name)), None)
    weight = getattr(norm, "weight", None)
    if not type(norm).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
        return None
    if weight.device.type != "cpu" or weight.dim() != 1 or not RMS_NORM.has_kernel(CPU, weight.dtype):
        return None
    return FusedRMSNorm(weight, epsilon)


def _is_same_norm(mine: FusedRMSNorm, own: Any) -> bool:
    """In bfloat16 bit for bit, but where the two sums of squares are rounded differently."""
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(64, mine.weight.shape[0], generator=random).to(mine.weight.dtype)
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
    fused = 0
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                gate, activation = getattr(child, "gate_proj", None), getattr(child, "act_fn", None)
                if not isinstance(gate, JoinedLinear) or activation is None or not hasattr(child, "down_proj"):
                    continue
                dtype = gate.whole.dtype
                if not SILU_MUL.has_kernel(CPU, dtype) or not _is_silu(activation, dtype):
                    continue
                found = GatedMLP(gate.whole, child.down_proj)
                if _is_same_mlp(found, child, gate):
                    setattr(parent, name, found)
                    fused += 1
    return fused


def _is_silu(activation: Any, dtype: torch.dtype) -> bool:
    x = torch.linspace(-20, 20, 1000).to(dtype)
    found = SILU_MUL.choose(CPU, dtype)(torch.cat([x, torch.ones_like(x)]))
    return torch.allclose(found, activation(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def _is_same_mlp(mine: GatedMLP, own: Any, gate: JoinedLinear) -> bool:
    """On tokens of all sizes, for some layers clamp what is large; each by itself. One pass: at the start of a large
    model every pass counts."""
    sizes = torch.tensor([1, 30, 1e3, 1e5]).repeat(2)[:, None]
    random = torch.Generator().manual_seed(0)
    x = (sizes * torch.randn(len(sizes), gate.in_features, generator=random)).to(gate.whole.dtype)
    try:
        found, expected = mine(x), own(x)
    except Exception:  # it wants more than x, or its layers do not go together like that
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    away = (found - expected).float().norm(dim=-1)
    return bool((away <= tolerance * expected.float().norm(dim=-1)).all())


_TRIAL = "steer_ops_trial"  # an attention that gives every query back


def fuse_attention(model: Any) -> int:
    """Replaces the attention layers of a model whose linear layers have been packed, in place, by what gives the same
    queries, keys and values to its attention on numbers drawn at random; says how many: none where nothing can be
    compiled."""
    fused = 0
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                query = getattr(child, "q_proj", None)
                if not isinstance(query, JoinedLinear) or isinstance(child, RotaryAttention):
                    continue
                if ROTARY.has_kernel(CPU, query.whole.dtype) and (found := _fused_attention(child, query)):
                    setattr(parent, name, found)
                    fused += 1
    return fused


def _fused_attention(own: Any, query: JoinedLinear) -> RotaryAttention | None:
    """None: the layer does something else."""
    config, dtype = getattr(own, "config", None), query.whole.dtype
    random = torch.Generator().manual_seed(0)
    seen: list[tuple[Any, ...]] = []

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        seen.append((query, key, value, options))
        return query.transpose(1, 2), None

    chosen = getattr(config, "_attn_implementation", None)
    try:
        AttentionInterface.register(_TRIAL, record)
        config._attn_implementation = _TRIAL  # type: ignore[union-attr]
        x = torch.randn(1, 5, query.in_features, generator=random).to(dtype)
        angles = torch.randn(1, 5, own.head_dim // 2, generator=random).repeat(1, 1, 2)
        given = {"position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)), "attention_mask": None}
        expected = own(x, **given)
        mine = RotaryAttention(own, seen[0][3])
        found = mine(x, **given)
    except Exception:  # it is called with something else, or is put together in another way
        return None
    finally:
        if config is not None:
            config._attn_implementation = chosen
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    same = len(seen) == 2 and len(found) == len(expected)
    for one, other in zip((*seen[1][:3], found[0]), (*seen[0][:3], expected[0]), strict=True) if same else ():
        same = same and one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)
    return mine if same else None
