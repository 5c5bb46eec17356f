"""Rotary embeddings: how a kernel reads what it has to turn, and a kernel that turns all queries and keys of a pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of

HEADS = 8  # that a program turns


@triton.jit
def load_turned(x, d, there, cos, sin, TURNED: tl.constexpr):
    """The numbers d of what lies at x, where they are `there`: the first TURNED of them turned, x * cos +
    rotate_half(x) * sin, rounded where transformers rounds. cos and sin point to TURNED numbers each."""
    own = tl.load(x + d, mask=there, other=0.0)
    if TURNED:
        HALF: tl.constexpr = TURNED // 2
        turns = d < TURNED
        other = tl.load(x + tl.where(d < HALF, d + HALF, d - HALF), mask=there & turns, other=0.0)
        cosine = tl.load(cos + d, mask=turns, other=0.0).to(tl.float32)
        sine = tl.load(sin + d, mask=turns, other=0.0).to(tl.float32)
        turned = (own.to(tl.float32) * cosine).to(own.dtype).to(tl.float32)
        turned += (other.to(tl.float32) * tl.where(d < HALF, -sine, sine)).to(own.dtype).to(tl.float32)
        own = tl.where(turns, turned.to(own.dtype), own)
    return own


@triton.jit
def _rotary(
    query,
    key,
    cos,
    sin,
    queries,
    keys,
    query_row,
    query_head,
    key_row,
    key_head,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    QUERY_PARTS: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, PAD)[None, :]
    cos += row * TURNED
    sin += row * TURNED
    if part < QUERY_PARTS:
        head = part * HEADS + h
        there = (head < QUERY_HEADS) & (d < WIDTH)
        turned = load_turned(query + row * query_row + head * query_head, d, there, cos, sin, TURNED)
        tl.store(queries + (row * QUERY_HEADS + head) * WIDTH + d, turned, mask=there)
    else:
        head = (part - QUERY_PARTS) * HEADS + h
        there = (head < KEY_HEADS) & (d < WIDTH)
        turned = load_turned(key + row * key_row + head * key_head, d, there, cos, sin, TURNED)
        tl.store(keys + (row * KEY_HEADS + head) * WIDTH + d, turned, mask=there)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `steer_ops.rotary`."""
    tokens, heads, width = query.shape
    kv_heads = key.shape[1]
    check(
        key.shape == (tokens, kv_heads, width) and key.dtype == query.dtype, "rotary", "queries and keys fit each other"
    )
    turned = check_turns("rotary", query, cos, sin)
    query, key = dense_rows(query), dense_rows(key)
    queries, keys = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key))
    if tokens:
        parts = -(-heads // HEADS) + -(-kv_heads // HEADS)
        strides = *query.stride()[:2], *key.stride()[:2]
        sizes = heads, kv_heads, width, triton.next_power_of_2(width), turned, HEADS
        cos, sin = cos.contiguous(), sin.contiguous()
        with on_device_of(query):
            _rotary[tokens, parts](query, key, cos, sin, queries, keys, *strides, *sizes, num_warps=1)
    return queries, keys


def check_turns(op: str, query: Tensor, cos: Tensor, sin: Tensor) -> int:
    """How many numbers of each head cosines and sines turn. query [N, heads, width]"""
    check(
        cos.dim() == 2
        and cos.shape == sin.shape
        and len(cos) == len(query)
        and cos.shape[1] % 2 == 0
        and cos.shape[1] <= query.shape[2]
        and cos.dtype == sin.dtype == query.dtype,
        op,
        "cos and sin are [N, turned], of the dtype of what they turn, even and no wider than a head",
    )
    return cos.shape[1]
