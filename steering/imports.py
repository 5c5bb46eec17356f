"""The start of a process that imports PyTorch and transformers."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextmanager
def importing() -> Iterator[None]:
    """Around imports: the garbage collector waits. What is imported stays, and to look through it again and again takes
    a sixth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def without_torch() -> Iterator[None]:
    """Around what imports transformers for a tokenizer: it is imported as where PyTorch is not installed, which it
    supports for tokenizers, and knows no models in this process from then on. That takes a quarter of the time and a
    fifth of the memory. PyTorch can be imported afterwards; where it has been already, nothing is done."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    advice = os.environ.get(ADVICE)
    os.environ[ADVICE] = "1"  # else it says that there is no PyTorch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
        if advice is None:
            del os.environ[ADVICE]
        else:
            os.environ[ADVICE] = advice
