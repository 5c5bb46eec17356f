"""Root mean square norms of a model on a CPU, in one operation instead of seven."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.native import DTYPES, kernels

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = (ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 2, ctypes.c_float, ctypes.c_void_p)
EPSILONS = ("variance_epsilon", "eps")  # what models call it


class FusedRMSNorm(nn.Module):
    """x [..., D] -> [..., D], as LlamaRMSNorm and its many copies in transformers have it."""

    def __init__(self, weight: Tensor, epsilon: float, function: Any) -> None:
        """weight [D]; `function`: the kernel for its dtype."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.variance_epsilon = epsilon
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        weight, width = self.weight, x.shape[-1]
        if x.dtype != weight.dtype or width != weight.shape[0]:
            raise ValueError(f"a norm of {tuple(weight.shape)} {weight.dtype} met {tuple(x.shape)} {x.dtype}")
        x = x.contiguous()
        out = torch.empty_like(x)
        parts = x.data_ptr(), weight.data_ptr(), self.variance_epsilon, out.data_ptr()
        self._function(x.numel() // width, width, *parts)
        return out


def fuse_norms(model: Any) -> int:
    """Replaces the RMS norms of a model on a CPU, in place, by what says the same on numbers drawn at random; says how
    many: none where nothing can be compiled. Norms of another dtype than the model's stay."""
    fused, dtype = 0, getattr(model, "dtype", None)
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                found = _fused(child)
                if found is None or found.weight.dtype != (dtype or found.weight.dtype):
                    continue
                if _says_the_same(found, child):
                    setattr(parent, name, found)
                    fused += 1
    return fused


def _fused(norm: Any) -> FusedRMSNorm | None:
    epsilon = next((getattr(norm, name) for name in EPSILONS if hasattr(norm, name)), None)
    weight = getattr(norm, "weight", None)
    if not type(norm).__name__.endswith("RMSNorm") or epsilon is None or weight is None:
        return None
    if weight.device.type != "cpu" or weight.dim() != 1 or weight.dtype not in DTYPES:
        return None
    function = kernels(SOURCE, ARGUMENTS).get(weight.dtype)
    return FusedRMSNorm(weight, epsilon, function) if function else None


def _says_the_same(mine: FusedRMSNorm, own: Any) -> bool:
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
