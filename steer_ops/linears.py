"""Linear layers, exchanged in place for layers that compute the same faster.

Those with the same input become one product. On a CPU they get their weights laid out once: in tiles for a kernel of
ours, or as oneDNN wants them. PyTorch's own `linear` lays the weight out anew in every call, which for the few tokens
of a decoding step takes longer than the product.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from steer_ops.cpu.build import cpu_flags
from steer_ops.cuda.library import DTYPES as CUDA_DTYPES
from steer_ops.ops import TILED_LINEAR, UNIT_BYTES, tiled
from steer_ops.plain import untiled
from steer_ops.registry import DTYPES, Op

# Layers that are given the same input, in the order in which models call them: one product for all of them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CPU = torch.device("cpu")
log = logging.getLogger(__name__)


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
Product = Packed | nn.Linear


def is_product(layer: Any) -> TypeGuard[Product]:
    """Whether a layer is a linear one, packed or PyTorch's own, that computes nothing else."""
    return isinstance(layer, Packed) or (type(layer) is nn.Linear and "forward" not in vars(layer))


def place_of(layer: Product) -> tuple[torch.device, torch.dtype]:
    """Where a linear layer's weight is, and its dtype."""
    own = layer.weight if isinstance(layer, nn.Linear) else layer
    return own.device, own.dtype


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


def pack_linears(model: Any, *, native: bool = True) -> int:
    """Replaces the linear layers of a model on a CPU, in place, where oneDNN or a kernel of ours takes them, and on
    CUDA those that become one product; says how many. Weights that nobody else holds are freed. `native`: by kernels of
    ours, where they can be had; on CUDA nothing is replaced without. Layers stay whose outputs for a token drawn at
    random come out otherwise."""
    refused = Counter[str]()
    # Of leaves no list: it would hold every weight that is replaced until all are.
    parents = [module for module in model.modules() if next(module.children(), None) is not None]
    with torch.no_grad():
        packed = sum(_pack_children(parent, native, refused) for parent in parents)
    tell_refused(refused, "the packed product")
    return packed


def _pack_children(parent: nn.Module, native: bool, refused: Counter[str]) -> int:
    packed = 0
    plain: dict[str, Any] = {name: child for name, child in parent.named_children() if _can_pack(child, native)}
    for names in TOGETHER:
        if set(names) <= plain.keys() and len({plain[name].bias is None for name in names}) == 1:
            own = {name: plain.pop(name) for name in names}
            packed += _exchange(parent, own, _joined(own, native), refused)
    for name, child in plain.items():
        if child.weight.device == CPU:
            found = _packed(_weight(child), child.bias, native)
            packed += _exchange(parent, {name: child}, {name: found}, refused)
    return packed


def _exchange(parent: nn.Module, own: dict[str, Any], mine: Mapping[str, nn.Module], refused: Counter[str]) -> int:
    """Puts linear layers in the place of others, if they compute the same; says how many."""
    same = _is_same_product(list(own.values()), list(mine.values()))
    if not agreed(same, _weight(next(iter(own.values()))).device):
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
        return all(is_close(one(x), other(x)) for one, other in zip(mine, own, strict=True))
    except Exception:  # what replaces it does not take what it takes
        return False


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


def agreed(same: bool, device: torch.device) -> bool:
    """Whether all processes that hold the model together (tensor parallel) say so: what one of them leaves as it is,
    all do, else some would wait for others in collectives that those never call."""
    if not (dist.is_available() and dist.is_initialized()):
        return same
    verdict = torch.tensor(int(same), device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict)


def all_have(op: Op, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel serves these in all processes that hold the model together: a kernel is tried in each."""
    return agreed(op.has_kernel(device, dtype), device)


def tell_refused(refused: Counter[str], what: str) -> None:
    """refused: how many layers of each class stay as they are."""
    for kind, count in refused.items():
        log.info("%d layers %s stay as they are: %s computes something else", count, kind, what)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Every vector of the last dimension, to its own length."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    away = (found - expected).float().norm(dim=-1)
    return bool((away <= tolerance * expected.float().norm(dim=-1)).all())
