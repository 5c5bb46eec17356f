"""Feed-forward layers with a gate, down(silu(gate(x)) * up(x)), on a CPU: three operations instead of five."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from server.layers.linears import JoinedLinear
from steering.native import kernels

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)


class GatedMLP(nn.Module):
    """x [..., in] -> [..., out], as LlamaMLP and its many copies in transformers have it."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, function: Any) -> None:
        """`gate_up`: gates and ups side by side, [..., in] -> [..., 2 * width]; `function`: the kernel."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(_gated(self.gate_up_proj(x), self._function))
        return found


def _gated(both: Tensor, function: Any) -> Tensor:
    """both [..., 2 * width] -> [..., width]"""
    both = both.contiguous()
    width = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], width)
    function(out.numel() // max(width, 1), width, both.data_ptr(), out.data_ptr())
    return out


def fuse_mlps(model: Any) -> int:
    """Replaces the feed-forward layers of a model whose linear layers have been packed, in place, where the kernel says
    the same on random numbers; says how many."""
    functions, fused = kernels(SOURCE, ARGUMENTS), 0
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                gate, activation = getattr(child, "gate_proj", None), getattr(child, "act_fn", None)
                if not isinstance(gate, JoinedLinear) or activation is None or not hasattr(child, "down_proj"):
                    continue
                function = functions.get(gate.whole.dtype)
                if function is None or not _is_silu(activation, function, gate.whole.dtype):
                    continue
                found = GatedMLP(gate.whole, child.down_proj, function)
                if _says_the_same(found, child, gate):
                    setattr(parent, name, found)
                    fused += 1
    return fused


def _is_silu(activation: Any, function: Any, dtype: torch.dtype) -> bool:
    x = torch.linspace(-20, 20, 1000).to(dtype)
    found = _gated(torch.cat([x, torch.ones_like(x)]), function)
    return torch.allclose(found, activation(x), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def _says_the_same(mine: GatedMLP, own: Any, gate: JoinedLinear) -> bool:
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
