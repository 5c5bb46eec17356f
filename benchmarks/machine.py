"""What a figure was measured on."""

import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from steer_ops.cpu.build import cpu_flags

VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides which kernels are used


def described() -> dict[str, Any]:
    """Machine, versions and command."""
    return {
        "processor": _processor(),
        "instructions": " ".join(flag for flag in VECTORS if flag in cpu_flags()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": f"python -m benchmarks.{_benchmark()} {' '.join(sys.argv[1:])}".strip(),
    }


def _benchmark() -> str:
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
