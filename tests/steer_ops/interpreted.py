"""Triton's interpreter, for kernels where there is no CUDA device: as it is, but for two things."""

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest


def mend_interpreter(patch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as integers of 16 bits, and would multiply those; and it looks through Triton's language anew
    for every function that is called in a kernel, which takes much of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, one: Any, other: Any, *rest: Any) -> Any:
        wide = (self.cast_impl(part, tl.float32) if part.dtype == tl.bfloat16 else part for part in (one, other))
        return multiply(self, *wide, *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(interpreter, "inspect", SimpleNamespace(**{**vars(inspect), "getmembers": cache(inspect.getmembers)}))
