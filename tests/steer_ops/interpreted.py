"""Triton's interpreter, for kernels where there is no CUDA device: as it is, but for three things."""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest


def mend_interpreter(patch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as integers of 16 bits, and would multiply those. What takes most of its time: it looks through
    Triton's language anew for every launch, and exchanges what is in there for every function that a kernel calls, too,
    though the launch has done that."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, one: Any, other: Any, *rest: Any) -> Any:
        wide = (self.cast_impl(part, tl.float32) if part.dtype == tl.bfloat16 else part for part in (one, other))
        return multiply(self, *wide, *rest)

    def call(self: Any, *args: Any, **named: Any) -> Any:
        return self.rewrite()(*args, **named)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter, "inspect", SimpleNamespace(**{**vars(inspect), "getmembers": cache(inspect.getmembers)}))
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
