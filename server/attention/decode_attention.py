"""Attention of single tokens on a CPU.

PyTorch's own attention reads the keys and values of single tokens at half the speed of the memory, in bfloat16 at a
tenth, and every row as far as the longest one of a call (docs/engine.md has the figures). `decode_attention.cpp` reads
each row's own, where they lie.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.attention.store import Store
from server.attention.torch_attention import Rules
from steer_ops import DTYPES
from steer_ops.cpu import build

SOURCE = Path(__file__).with_suffix(".cpp")
ARGUMENTS = (*[ctypes.c_void_p] * 8, ctypes.c_float, ctypes.c_float, ctypes.c_void_p)


class DecodeAttention:
    """The compiled kernel, for the dtypes of `steer_ops`."""

    def __init__(self, functions: dict[torch.dtype, Any]) -> None:
        self._functions = functions

    def __call__(
        self, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, store: Store, out: Tensor, rules: Rules
    ) -> None:
        """Writes the keys and values of rows into the store and their attention into `out`.

        rows [R, 4] int64, contiguous: token of the line, start and size of its extent, how many tokens it has. query
        [N, heads, width], key and value [1, key heads, N, width], out [N, heads, value width], contiguous.
        """
        if not query.dtype == key.dtype == value.dtype == store.keys.dtype:
            raise ValueError(f"one dtype for all: queries are {query.dtype}, keys {key.dtype}, values {value.dtype}")
        query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
        sinks = None if rules.sinks is None else rules.sinks.float().contiguous()
        call = (ctypes.c_int64 * 12)(
            *(len(rows), query.shape[1], key.shape[1], query.shape[2], value.shape[3], rules.window or 0),
            *(query.stride(1), query.stride(0), key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
        )
        self._functions[query.dtype](
            ctypes.addressof(call),
            *(part.data_ptr() for part in (rows, query, key, value, store.keys, store.values, out)),
            query.shape[2] ** -0.5 if rules.scale is None else rules.scale,
            rules.cap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )


@cache
def decode_attention() -> DecodeAttention | None:
    """The kernel for this machine; None where it cannot be had."""
    library = build.load(SOURCE)
    if library is None:
        return None
    functions = {dtype: getattr(library, f"decode_attention_{str(dtype).removeprefix('torch.')}") for dtype in DTYPES}
    for function in functions.values():
        function.argtypes, function.restype = ARGUMENTS, None
    return DecodeAttention(functions)
