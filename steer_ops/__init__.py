"""Everything that is computed faster than plain PyTorch: ops with a reference in PyTorch and kernels beside it.

Each op is a function of this package: it runs the kernel for its tensors' device and dtype where there is one, else
the reference of the same name in `steer_ops.plain`. The constants are the ops themselves, for callers that choose an
implementation once (`Op.choose`) or ask whether there is a kernel (`Op.has_kernel`). `steer_ops.layers` exchanges the
layers of a Hugging Face model.
"""

from steer_ops.ops import (
    ADD_RMS_NORM,
    COPY_KV,
    GATHER_KV,
    GELU_TANH_MUL,
    PAGED_ATTENTION_DECODE,
    PAGED_ATTENTION_PREFILL,
    RMS_NORM,
    ROTARY,
    SILU_MUL,
    STEER_AND_COUNT,
    TILED_LINEAR,
    VARLEN_ATTENTION,
    WRITE_KV,
    Heads,
    add_rms_norm,
    copy_kv,
    gather_kv,
    gelu_tanh_mul,
    paged_attention_decode,
    paged_attention_prefill,
    rms_norm,
    rotary,
    silu_mul,
    steer_and_count,
    tiled,
    tiled_linear,
    varlen_attention,
    write_kv,
)
from steer_ops.registry import DTYPES, Op

__all__ = [
    "ADD_RMS_NORM",
    "COPY_KV",
    "DTYPES",
    "GATHER_KV",
    "GELU_TANH_MUL",
    "PAGED_ATTENTION_DECODE",
    "PAGED_ATTENTION_PREFILL",
    "RMS_NORM",
    "ROTARY",
    "SILU_MUL",
    "STEER_AND_COUNT",
    "TILED_LINEAR",
    "VARLEN_ATTENTION",
    "WRITE_KV",
    "Heads",
    "Op",
    "add_rms_norm",
    "copy_kv",
    "gather_kv",
    "gelu_tanh_mul",
    "paged_attention_decode",
    "paged_attention_prefill",
    "rms_norm",
    "rotary",
    "silu_mul",
    "steer_and_count",
    "tiled",
    "tiled_linear",
    "varlen_attention",
    "write_kv",
]
