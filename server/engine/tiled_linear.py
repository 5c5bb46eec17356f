"""Linear layers in float32 on a CPU with AVX-512: as fast as the weight is read, for the few tokens of a decoding step.

oneDNN takes 15 to 35 microseconds a call before it computes anything and reads a weight at two thirds of the memory's
speed (docs/engine.md has the figures). It stays on other CPUs and in bfloat16, where it has instructions of its own.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.native import kernels

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)
OUTPUTS = 32  # of a tile


class TiledLinear(nn.Module):
    """x [..., in] -> [..., out]. What a token gets is the same in every bit whatever is computed beside it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, function: Any) -> None:
        """weight [out, in]; `function`: see `tiled_linear`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        tiles = -(-self.out_features // OUTPUTS)
        padded = weight.new_zeros(tiles * OUTPUTS, self.in_features)
        padded[: self.out_features] = weight.detach()
        self._tiles = padded.view(tiles, OUTPUTS, self.in_features).transpose(1, 2).contiguous()
        self._function = function

    @property
    def weight(self) -> Tensor:
        """A plain copy, [out, in]."""
        return self._tiles.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = x.numel() // self.in_features, self.in_features, self.out_features
        self._function(self._tiles.data_ptr(), bias, x.data_ptr(), out.data_ptr(), *sizes)
        return out


@cache
def tiled_linear() -> Any | None:
    """The function for `TiledLinear`; None where it cannot be had."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    functions = kernels(SOURCE, ARGUMENTS, (torch.float32,))
    return functions and functions[torch.float32]
