"""Compiles the C++ ops with the machine's own compiler, for its own CPU, and keeps the library in the user's cache.

The library registers its functions with PyTorch when it is loaded (library.cpp). Where there is no compiler, or it
fails, the log says so, and PyTorch computes everything.
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
from threading import Lock

import torch

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("library.cpp")
TORCH = Path(torch.__file__).parent
# The stable ABI as of PyTorch 2.11, the oldest that pyproject.toml admits.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
TIMEOUT_S = 300.0
_lock = Lock()
_loaded: dict[Path, ctypes.CDLL | None] = {}


def load(source: Path = SOURCE) -> ctypes.CDLL | None:
    """The library made from a C++ file and the headers beside it, loaded once in this process; None where it cannot be
    compiled. The first call may take seconds. Threads may call this at the same time."""
    with _lock:
        if source not in _loaded:
            _loaded[source] = _load_or_log(source)
        return _loaded[source]


def _load_or_log(source: Path) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None:
        log.info("there is no C++ compiler: PyTorch computes everything, which takes longer")
        return None
    try:
        return _load(source, compiler)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s cannot be compiled (%s): PyTorch computes that, which takes longer", source.name, error)
        log.debug("%s", (getattr(error, "stderr", None) or b"").decode(errors="replace"))
        return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") if sys.platform == "linux" else None


def _load(source: Path, compiler: str) -> ctypes.CDLL:
    """From the user's cache, or compiled and put there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    machine = " ".join([platform.machine(), *sorted(cpu_flags()), *FLAGS, str(torch.__version__)])
    made_of = [source.read_bytes(), *(header.read_bytes() for header in sorted(source.parent.glob("*.h")))]
    digest = hashlib.sha256(b"|".join([*made_of, version, machine.encode()])).hexdigest()
    name = f"{source.stem}-{digest[:16]}.so"
    folder = _cache_folder()
    kept = folder / name if folder else None
    if kept and _is_ours(kept.parent) and _is_ours(kept):
        with suppress(OSError):  # it is no library
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as here:
        unit, built = f"{here}/unit.o", f"{here}/{name}"
        # Linked without an OpenMP runtime of its own: PyTorch has loaded one, and there must be one only.
        for command in (
            [*FLAGS, f"-I{TORCH / 'include'}", "-c", str(source), "-o", unit],
            ["-shared", unit, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", built],
        ):
            subprocess.run([compiler, *command], capture_output=True, check=True, timeout=TIMEOUT_S)
        loaded = ctypes.CDLL(built)
        if kept:
            with suppress(OSError):  # a folder that cannot be written to costs the next start some seconds
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
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


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
