"""Which kernels there are for CUDA, registered with PyTorch when one is first asked for.

Triton compiles its kernels when they are first launched, with a C compiler and Python's headers, and keeps them in the
user's cache. Where that does not work the log says so, once, and PyTorch computes those ops.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from steer_ops.cuda import flash

log = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that Triton's kernels compute
Kernels = dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]]
_library: Any = torch.library.Library("steer_ops", "IMPL", "CUDA")


def has_kernel(name: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel of an op for a dtype on this machine's CUDA devices."""
    return name in kernels() and dtype in kernels()[name][1]


@cache
def kernels() -> Kernels:
    """By the names of their ops, with their dtypes."""
    found = triton_kernels(torch.device("cuda"))
    if flash.runs_here():
        found["varlen_attention"] = flash.varlen_attention, flash.DTYPES
    for name, (kernel, _) in found.items():
        _library.impl(name, kernel)
    return found


def triton_kernels(device: torch.device) -> Kernels:
    """None where Triton is missing, or compiles nothing for this device."""
    try:
        from steer_ops.cuda import kv_cache, layers, paged_attention, paged_prefill, rotary, steer

        layers.rms_norm(torch.ones(1, 16, device=device), torch.ones(16, device=device), 1e-5)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.warning(
            "Triton compiles no kernels here (%s): PyTorch computes that, which takes longer. They need the triton "
            "package, a C compiler (gcc) and Python's headers (python3-dev)",
            reason[-1],
        )
        return {}
    functions = (
        paged_attention.paged_attention_decode,
        paged_prefill.paged_attention_prefill,
        kv_cache.write_kv,
        kv_cache.gather_kv,
        kv_cache.copy_kv,
        steer.steer_and_count,
        layers.rms_norm,
        layers.add_rms_norm,
        layers.silu_mul,
        layers.gelu_tanh_mul,
        rotary.rotary,
    )
    return {function.__name__: (function, DTYPES) for function in functions}
