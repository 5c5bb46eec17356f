"""Memory that one thread has freed is there for the others."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.malloc import VARIABLE

THREADS = 8
COUNT_ARENAS = f"""
import ctypes, sys, threading
from server.malloc import limit_arenas
limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier({THREADS})
def allocate():
    together.wait()
    for _ in range(50):
        libc.malloc(3000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range({THREADS})]
for one in threads: one.start()
for one in threads: one.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def arenas(tmp_path: Path, **environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    told = tmp_path / "malloc.xml"
    subprocess.run([sys.executable, "-c", COUNT_ARENAS, str(told)], check=True, env=inherited | environment, timeout=60)
    return told.read_text().count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's")
def test_many_threads_share_few_arenas_except_where_the_operator_says_otherwise(tmp_path: Path) -> None:
    assert arenas(tmp_path) == 2
    assert arenas(tmp_path, MALLOC_ARENA_MAX="5") == 5
