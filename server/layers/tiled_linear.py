"""Linear layers on a CPU with AVX2 or AVX-512: as fast as the weight is read, for the few tokens of a decoding step.

oneDNN takes 15 to 35 microseconds a call before it computes anything and reads a weight at two thirds of the memory's
speed (docs/engine.md has the figures); without AVX-512 it has no bfloat16, and PyTorch's own is six times slower than
this. It stays on other CPUs, and in bfloat16 where it has AMX.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.native import DTYPES, cpu_flags, kernels

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)
OUTPUTS = 32  # of a tile
UNIT = 4  # bytes of an input's unit: a float, or two bfloat16


class TiledLinear(nn.Module):
    """x [..., in] -> [..., out]. What a token gets is the same in every bit whatever is computed beside it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, function: Any) -> None:
        """weight [out, in]; `function`: see `tiled_linear`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        tiles, pair = -(-self.out_features // OUTPUTS), UNIT // weight.itemsize
        padded = weight.new_zeros(tiles * OUTPUTS, self.in_features)
        padded[: self.out_features] = weight.detach()
        # [tiles, units, outputs, numbers of a unit]
        self._tiles = padded.view(tiles, OUTPUTS, -1, pair).transpose(1, 2).contiguous()
        self._function = function

    @property
    def weight(self) -> Tensor:
        """A plain copy, [out, in]."""
        return self._tiles.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(f"a layer of {self.in_features} {self.dtype} met {tuple(x.shape)} {x.dtype}")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = x.numel() // self.in_features, self._tiles.shape[1], self.out_features
        self._function(self._tiles.data_ptr(), bias, x.data_ptr(), out.data_ptr(), *sizes)
        return out


def tiled_linear(weight: Tensor) -> Any | None:
    """The function for a `TiledLinear` of this weight [out, in]; None where there is none."""
    whole = weight.shape[1] * weight.itemsize % UNIT == 0
    return _functions().get(weight.dtype) if whole else None


@cache
def _functions() -> dict[torch.dtype, Any]:
    flags = cpu_flags()
    if not flags & {"avx2", "avx512f"}:
        return {}
    return kernels(SOURCE, ARGUMENTS, DTYPES[:1] if "amx_bf16" in flags else DTYPES)
