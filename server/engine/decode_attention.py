"""Attention of single tokens on a CPU, compiled for it when the server starts.

PyTorch's own attention reads the keys and values of single tokens at half the speed of the memory, in bfloat16 at a
tenth, and every row as far as the longest one of a call (docs/engine.md has the figures). `decode_attention.cpp` reads
each row's own, where they lie. It needs a C++ compiler; without one PyTorch attends.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from server.engine.store import Store
from server.engine.torch_attention import Rules

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
DTYPES = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}


class DecodeAttention:
    """The compiled kernel."""

    def __init__(self, library: Path) -> None:
        """Raises OSError where it cannot be loaded."""
        loaded = ctypes.CDLL(str(library))
        self._functions = {}
        for dtype, name in DTYPES.items():
            function = getattr(loaded, name)
            function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_float] * 2 + [ctypes.c_void_p]
            function.restype = None
            self._functions[dtype] = function

    def __call__(
        self, rows: Tensor, query: Tensor, key: Tensor, value: Tensor, store: Store, out: Tensor, rules: Rules
    ) -> None:
        """Writes the keys and values of rows into the store and their attention into `out`.

        rows [R, 4] int64, contiguous: token of the line, start and size of its extent, how many tokens it has. query
        [N, heads, width], key and value [1, key heads, N, width], out [N, heads, value width], contiguous.
        """
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
def compiled() -> DecodeAttention | None:
    """The kernel for this machine, compiled when this user first needs it; None where that cannot be."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if sys.platform != "linux" or compiler is None:
        log.info("there is no C++ compiler: PyTorch attends to single tokens, which takes longer")
        return None
    try:
        return _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the attention kernel cannot be compiled (%s): PyTorch attends to single tokens", error)
        log.debug("%s", getattr(error, "stderr", b"").decode(errors="replace"))
        return None


def _load(compiler: str) -> DecodeAttention:
    """From the user's cache, or compiled and put there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    made_of = [SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _cpu().encode()]
    name = f"{SOURCE.stem}-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mat-steer" / name
    if kept.exists():
        return DecodeAttention(kept)
    with tempfile.TemporaryDirectory() as folder:
        unit, built = Path(folder) / "unit.o", Path(folder) / name
        # Linked without OpenMP's runtime: PyTorch's is there already, and there must be one only.
        for command in ([*FLAGS, "-c", str(SOURCE), "-o", str(unit)], ["-shared", str(unit), "-o", str(built)]):
            subprocess.run([compiler, *command], capture_output=True, check=True, timeout=300)
        loaded = DecodeAttention(built)
        with suppress(OSError):  # a folder that cannot be written to costs the next start a second
            _keep(built, kept)
    return loaded


def _keep(built: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = kept.with_suffix(f".{os.getpid()}")
    shutil.copy(built, own)
    own.replace(kept)  # at one go: another server may be starting


def _cpu() -> str:
    """What the machine's instructions depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
