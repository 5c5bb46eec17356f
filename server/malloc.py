"""glibc's malloc, kept from spreading over arenas: memory that a thread has freed is there for the other threads."""

import ctypes
import os

ARENAS = 2
VARIABLE = "MALLOC_ARENA_MAX"  # glibc's own: where it is set, it holds
_M_ARENA_MAX = -8  # glibc's malloc.h


def limit_arenas() -> None:
    """Of this process, before it has threads, and of those that it starts. Without it a server of many threads grows
    for hours: each arena keeps what its threads have freed (benchmarks/README.md). Nothing is done without glibc."""
    if VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = str(ARENAS)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # TypeError: Windows
        return
    mallopt(_M_ARENA_MAX, ARENAS)
