"""Triton's interpreter, for kernels where there is no CUDA device: as it is, but for three things."""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest


def mend_interpreter(patch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as integers of 16 bits, and would multiply those. What takes most of its time: it looks through
    Triton's language anew for every launch, and exchanges what is in there for every function of ours that a kernel
    calls, too, though the launch has done that."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, one: Any, other: Any, *rest: Any) -> Any:
        wide = (self.cast_impl(part, tl.float32) if part.dtype == tl.bfloat16 else part for part in (one, other))
        return multiply(self, *wide, *rest)

    exchanging = interpreter.InterpretedFunction.__call__
    sees_core = cache(lambda function: any(one is tl.core for one in function.__globals__.values()))

    def call(self: Any, *args: Any, **named: Any) -> Any:
        if sees_core(self.fn):  # Triton's own functions, as tl.sum: the launch has not exchanged what these see
            return exchanging(self, *args, **named)
        return self.rewrite()(*args, **named)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter, "inspect", SimpleNamespace(**{**vars(inspect), "getmembers": cache(inspect.getmembers)}))
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
