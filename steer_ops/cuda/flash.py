"""Attention of several texts in one call: FlashAttention 2, as every supported PyTorch has it built in."""

from typing import Any

import torch
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows

DTYPES = (torch.float16, torch.bfloat16)
MOST_WIDTH, WIDTH_UNIT = 256, 8
AMPERE = (8, 0)  # compute capability


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    key_lens: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `steer_ops.varlen_attention`."""
    width = query.shape[-1]
    right = takes(width, values.shape[-1], query.dtype)
    check(right, "varlen_attention", "FlashAttention 2 computes no such widths or dtype")
    flash: Any = torch.ops.aten._flash_attention_forward
    # `key_starts` says no more than where each text begins: how long it is stands in `key_lens`.
    found: Tensor = flash(
        dense_rows(query),
        dense_rows(keys),
        dense_rows(values),
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        0.0,  # dropout
        True,  # causal
        False,  # debug mask
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
        seqused_k=key_lens,
    )[0]
    return found


def runs_here() -> bool:
    """Whether all GPUs of this machine are new enough."""
    devices = range(torch.cuda.device_count())
    return all(torch.cuda.get_device_capability(device) >= AMPERE for device in devices)


def takes(width: int, value_width: int, dtype: torch.dtype) -> bool:
    """Whether it computes heads of such widths."""
    return dtype in DTYPES and width == value_width and width <= MOST_WIDTH and width % WIDTH_UNIT == 0
