"""`operators.steer` for a site of a bank on a CPU, in one pass over the tokens instead of thirty operations."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.native import kernels
from steering.site_buffers import SiteBuffers

ARGUMENTS = (ctypes.c_void_p,) * 11


def fused_steer(at: SiteBuffers, activations: Tensor, owners: Tensor, counts: Tensor) -> Tensor | None:
    """Steers activations [N, D] by the first N multipliers of a site; N `counts` go up where the site is the owner.

    None, having done nothing, where PyTorch has to do it, or has to say what is wrong: on other devices, dtypes and
    widths, where gradients are wanted, and where nothing can be compiled.
    """
    if activations.device.type != "cpu" or at.vectors.device.type != "cpu" or activations.shape[-1] != at.width:
        return None
    if type(activations) is not Tensor or (torch.is_grad_enabled() and activations.requires_grad):
        return None
    function = _functions().get(activations.dtype)
    if function is None:
        return None
    if activations.stride(-1) != 1:
        activations = activations.contiguous()
    tokens, width = activations.shape
    out = torch.empty_like(activations, memory_format=torch.contiguous_format)
    sizes = tokens, len(at.columns), width, activations.stride(0), at.multipliers.stride(0), at.owner
    call = (ctypes.c_int64 * 6)(*sizes)
    parts = activations, out, at.vectors, at.weights, at.biases, at.kinds, at.keep_norm, at.multipliers, owners, counts
    function(ctypes.addressof(call), *(part.data_ptr() for part in parts))
    return out


def can_fuse() -> bool:
    """Whether there is a kernel; the first time it is compiled, which may take seconds."""
    return bool(_functions())


@cache
def _functions() -> dict[torch.dtype, Any]:
    return kernels(Path(__file__).with_name("steer.cpp"), ARGUMENTS)
