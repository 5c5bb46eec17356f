"""The memory of a process that serves for weeks: Python's garbage collector, glibc's malloc, a tokenizer's cache."""

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ARENAS = 2
ARENAS_VARIABLE = "MALLOC_ARENA_MAX"  # glibc's own: where it is set, it holds
TRIM_S = 60.0
CACHED_WORDS = 1000
_M_ARENA_MAX = -8  # glibc's malloc.h


@contextmanager
def heap_frozen() -> Iterator[None]:
    """The garbage collector does not look at what there is before, the model and the libraries: that would stop every
    stream for long. It does afterwards: else Triton's binding tells of leaks at the end of the process."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def limit_arenas() -> None:
    """Memory that a thread has freed is there for the other threads: of this process, before it has threads, and of
    those that it starts. With glibc's default each arena keeps what its threads have freed, and a server of many
    threads grows for hours (benchmarks/README.md). Nothing is done without glibc."""
    if ARENAS_VARIABLE in os.environ:
        return
    os.environ[ARENAS_VARIABLE] = str(ARENAS)
    if mallopt := _libc("mallopt"):
        mallopt(_M_ARENA_MAX, ARENAS)


def trim_heap() -> None:
    """Whole pages that are free in the heap go back to the operating system, which takes a few milliseconds: between
    what is used, glibc would keep them. Nothing is done without glibc."""
    if trim := _libc("malloc_trim"):
        trim(0)


@contextmanager
def heap_trimmed(every: float = TRIM_S) -> Iterator[None]:
    """The same every so many seconds."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every):
            trim_heap()

    threading.Thread(target=run, name="heap", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def limit_word_cache(tokenizer: Any) -> None:
    """Hugging Face's tokenizers keep, in each of their threads, how the first so many words were split; by default
    10,000, which takes some 3 MB and, where prompts have numbers in them, half an hour of traffic."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if resize := getattr(model, "_resize_cache", None):  # BPE and Unigram have it
        resize(CACHED_WORDS)


def _libc(name: str) -> Callable[..., Any] | None:
    try:
        found: Callable[..., Any] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
    return found
