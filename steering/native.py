"""Kernels in C++ for the CPU that this process runs on, compiled when a user first needs them.

A step of a small model is hundreds of small operations, of which each takes PyTorch several microseconds; and some of
its operations are slow on a CPU. Everything that is computed here has its twin in PyTorch, which is what runs on other
devices and where there is no C++ compiler.
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
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
HEADER = Path(__file__).with_suffix(".h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
DTYPES = (torch.float32, torch.bfloat16)


def kernels(source: Path, arguments: Sequence[Any], dtypes: Sequence[torch.dtype] = DTYPES) -> dict[torch.dtype, Any]:
    """The functions that a source file defines for each dtype, called as the file and the dtype ("norm_float32");
    `arguments`: their ctypes. An old compiler may lack some; why there are none is in the log."""
    library = _library(source)
    functions = {}
    for dtype in dtypes if library else ():
        function = getattr(library, f"{source.stem}_{str(dtype).removeprefix('torch.')}", None)
        if function is not None:
            function.argtypes, function.restype = arguments, None
            functions[dtype] = function
    return functions


@cache
def _library(source: Path) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        return _load(source, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s cannot be compiled (%s): PyTorch computes that, which takes longer", source.name, error)
        log.debug("%s", (getattr(error, "stderr", None) or b"").decode(errors="replace"))
        return None


@cache
def _compiler() -> str | None:
    found = shutil.which(os.environ.get("CXX") or "g++") if sys.platform == "linux" else None
    if found is None:
        log.info("there is no C++ compiler: PyTorch computes everything, which takes longer")
    return found


def _load(source: Path, compiler: str) -> ctypes.CDLL:
    """From the user's cache, or compiled and put there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    machine = " ".join([platform.machine(), *sorted(cpu_flags()), *FLAGS])
    made_of = [source.read_bytes(), HEADER.read_bytes(), version, machine.encode()]
    name = f"{source.stem}-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    folder = _cache_folder()
    kept = folder / name if folder else None
    if kept and _is_ours(kept.parent) and _is_ours(kept):
        with suppress(OSError):  # it is no library
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as here:
        unit, built = f"{here}/unit.o", f"{here}/{name}"
        # Linked without OpenMP's runtime: PyTorch's is there already, and there must be one only.
        for command in ([*FLAGS, f"-I{HEADER.parent}", "-c", str(source), "-o", unit], ["-shared", unit, "-o", built]):
            subprocess.run([compiler, *command], capture_output=True, check=True, timeout=300)
        loaded = ctypes.CDLL(built)
        if kept:
            with suppress(OSError):  # a folder that cannot be written to costs the next start a second
                _keep(Path(built), kept)
    return loaded


def _cache_folder() -> Path | None:
    """This user's folder for what has been compiled; None: there is nowhere to keep it."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mat-steer"
    except RuntimeError:  # a user without a home
        return None


def _is_ours(path: Path) -> bool:
    """Whether only this user can have written to it: it is about to be run."""
    try:
        told = path.stat()
    except OSError:
        return False
    return told.st_uid == os.getuid() and not told.st_mode & 0o022


def _keep(built: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, copy = tempfile.mkstemp(dir=kept.parent)
    with open(handle, "wb") as file:
        file.write(built.read_bytes())
    Path(copy).replace(kept)  # at one go: another process may be starting


@cache
def cpu_flags() -> frozenset[str]:
    """What instructions the CPU has, as Linux calls them ("avx512f"); nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.partition(":")[2].split())
