"""Linear layers of a model on a CPU, with weights laid out once: in tiles of our own, or as oneDNN wants them.

PyTorch's own `linear` lays the weight out anew in every call, which for the few tokens of a decoding step takes longer
than the product (docs/engine.md has the figures).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.layers.tiled_linear import TiledLinear, tiled_linear
from steering.native import DTYPES

# Layers that are given the same input, in the order in which models call them: one product for all of them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out]."""

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


def pack(model: Any, *, native: bool = True) -> int:
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
    function = tiled_linear(weight) if native else None
    return TiledLinear(weight, bias, function) if function else PackedLinear(weight, bias)


def _can_pack(layer: Any, native: bool) -> bool:
    # Only the classes themselves: a subclass computes something else.
    if type(layer) not in (nn.Linear, Conv1D) or layer.weight.device.type != "cpu" or layer.weight.dtype not in DTYPES:
        return False
    return PackedLinear.takes(layer.weight.dtype) or (native and tiled_linear(_weight(layer)) is not None)


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
