"""Rotary position embeddings of a model on a CPU: one operation instead of sixteen.

transformers' attention layers call a function of their file, `apply_rotary_pos_emb`. A layer's `forward` is made anew
with the same code and another function under that name, for this layer alone: the file and other models stay as they
are.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from steering.native import kernels

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = (ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 7)
NAME = "apply_rotary_pos_emb"
Rotation = Callable[..., tuple[Tensor, Tensor]]


class FusedRotary:
    """Stands for a file's function, which still answers where it is asked for something else."""

    def __init__(self, own: Rotation, functions: dict[torch.dtype, Any]) -> None:
        self.own = own
        self._functions = functions

    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """query [1, heads, N, width], key [1, key heads, N, width], cos and sin [1, N, width] -> both, turned."""
        function = self._functions.get(given[0].dtype) if len(given) == 4 and not named else None
        if function is None or not _fits(*given):
            return self.own(*given, **named)
        query, key, cos, sin = given
        _, heads, tokens, width = query.shape
        key_heads = key.shape[1]
        queries, keys = query.new_empty(1, tokens, heads, width), key.new_empty(1, tokens, key_heads, width)
        (_, q_head, q_token, _), (_, k_head, k_token, _) = query.stride(), key.stride()
        strides = (ctypes.c_int64 * 6)(heads, q_head, q_token, key_heads, k_head, k_token)
        parts = query, key, cos.contiguous(), sin.contiguous(), queries, keys
        function(tokens, width, ctypes.addressof(strides), *(part.data_ptr() for part in parts))
        return queries.transpose(1, 2), keys.transpose(1, 2)


def _fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        query.dtype == key.dtype == cos.dtype == sin.dtype
        and query.shape[0] == 1
        and (1, *query.shape[2:]) == (key.shape[0], *key.shape[2:]) == cos.shape == sin.shape
        and query.shape[3] % 2 == 0
        and query.stride(3) == key.stride(3) == 1
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad))
    )


def fuse_rotary(model: Any) -> int:
    """Exchanges the function that the attention layers of a model call, where it says the same on random numbers; says
    for how many layers."""
    functions, fused = kernels(SOURCE, ARGUMENTS), 0
    found: dict[Rotation, FusedRotary | None] = {}
    for layer in model.modules():
        own = _called(layer)
        if own is None or not functions:
            continue
        if own not in found:
            mine = FusedRotary(own, functions)
            found[own] = mine if all(_says_the_same(mine, dtype) for dtype in functions) else None
        if (exchanged := found[own]) is not None:
            layer.forward = MethodType(_calling(type(layer).forward, exchanged), layer)
            fused += 1
    return fused


def _called(layer: nn.Module) -> Rotation | None:
    """The function that a layer on a CPU calls to turn its queries and keys."""
    forward: Any = type(layer).forward
    parameter = next(layer.parameters(), None)
    if "forward" in vars(layer) or (parameter is not None and parameter.device.type != "cpu"):
        return None
    if not isinstance(forward, FunctionType) or forward.__closure__ or NAME not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(NAME)


def _calling(forward: Any, rotary: FusedRotary) -> FunctionType:
    """The same code with another function under the name."""
    names = {**forward.__globals__, NAME: rotary}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _says_the_same(mine: FusedRotary, dtype: torch.dtype) -> bool:
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 5, heads, 8, generator=random).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(1, 5, 4, generator=random).repeat(1, 1, 2)
    angle = angles.cos().to(dtype), angles.sin().to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0
    try:
        expected = mine.own(query, key, *angle)
        return all(
            found.dtype == other.dtype and torch.allclose(found, other, rtol=tolerance, atol=tolerance)
            for found, other in zip(mine(query, key, *angle), expected, strict=True)
        )
    except Exception:  # it is called with something else
        return False
