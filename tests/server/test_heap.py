"""What is free in the heap is there for all threads, and for other processes."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from server.heap import ARENAS_VARIABLE

DEMO = Path(__file__).parents[2] / "demo/model"
THREADS = 8
COUNT_ARENAS = f"""
import ctypes, sys, threading
from server.heap import limit_arenas
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
    inherited = {name: value for name, value in os.environ.items() if name != ARENAS_VARIABLE}
    told = tmp_path / "malloc.xml"
    subprocess.run([sys.executable, "-c", COUNT_ARENAS, str(told)], check=True, env=inherited | environment, timeout=60)
    return told.read_text().count("<heap nr=")


TRIM = """
import ctypes, resource, sys, time
from server.heap import heap_trimmed
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
taken = [libc.malloc(3000) for _ in range(20000)]
for one in taken:
    ctypes.memset(one, 1, 3000)
for number, one in enumerate(taken):
    if number % 100:  # what is left holds the heap's end
        libc.free(ctypes.c_void_p(one))
before = resident()
with heap_trimmed(0.05):
    until = time.monotonic() + 30
    while resident() > before - 40_000_000 and time.monotonic() < until:
        time.sleep(0.05)
print(before - resident())
"""
WORDS = """
import ctypes, sys
from transformers import AutoTokenizer
from server.tokenizer import Codec
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
codec = Codec(tokenizer, vocab=len(tokenizer), context=None)
def tokenize(first, last):
    for number in range(first, last):
        codec.encode(f"{number}. A bear lives", "prompt")
tokenize(100_000, 102_000)
before = mallinfo().uordblks
tokenize(200_000, 206_000)
print(mallinfo().uordblks - before)
"""
of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's")


@of_glibc
def test_many_threads_share_few_arenas_except_where_the_operator_says_otherwise(tmp_path: Path) -> None:
    assert arenas(tmp_path) == 2
    assert arenas(tmp_path, MALLOC_ARENA_MAX="5") == 5


@of_glibc
def test_free_pages_between_what_is_used_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", TRIM], check=True, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) > 40_000_000


@of_glibc
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc is older than 2.33")
def test_prompts_with_words_that_nobody_has_sent_take_no_memory_for_ever() -> None:
    """Without a bound 6,000 of them take 2 MB."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", ARENAS_VARIABLE: "1"}
    done = subprocess.run(
        [sys.executable, "-c", WORDS, str(DEMO)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert int(done.stdout) < 200_000
