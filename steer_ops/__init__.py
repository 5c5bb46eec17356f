"""Everything that is computed faster than plain PyTorch: ops with a twin in PyTorch and kernels beside it.

Each op is a function of this package: it runs the kernel for its tensors' device and dtype where there is one, else
the twin of the same name in `steer_ops.plain`. The constants are the ops themselves, for callers that choose an
implementation once (`Op.choose`) or ask whether there is a kernel (`Op.has_kernel`). `steer_ops.layers` exchanges the
layers of a Hugging Face model.
"""

from steer_ops.ops import (
    PAGED_ATTENTION_DECODE,
    RMS_NORM,
    ROTARY,
    SILU_MUL,
    STEER_AND_COUNT,
    TILED_LINEAR,
    paged_attention_decode,
    rms_norm,
    rotary,
    silu_mul,
    steer_and_count,
    tiled,
    tiled_linear,
)
from steer_ops.registry import DTYPES, Op

__all__ = [
    "DTYPES",
    "PAGED_ATTENTION_DECODE",
    "RMS_NORM",
    "ROTARY",
    "SILU_MUL",
    "STEER_AND_COUNT",
    "TILED_LINEAR",
    "Op",
    "paged_attention_decode",
    "rms_norm",
    "rotary",
    "silu_mul",
    "steer_and_count",
    "tiled",
    "tiled_linear",
]
