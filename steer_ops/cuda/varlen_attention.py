"""Attention of new tokens of several texts, in one launch: what FlashAttention 2 does not take, too.

A program has some rows of one text and one key head; a row is a new token's head, so that the query heads that share a
key head share what is read of it. It reads keys from the first that one of its rows sees to the last, tile by tile, and
compares positions only in tiles that not all of its rows see whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of, shared_memory

LOG2E = tl.constexpr(1.4426950408889634)
ROWS, TILE = 128, 64  # of a program, and keys that it reads at once, at most
WIDE_ROWS, WIDE_TILE = 32, 32  # of float32, whose products keep all that they read in registers
SMALLEST_DOT = 16  # sides of a matrix product
STAGES = 2  # tiles of keys and values that are on their way


@triton.jit
def _read(
    q,
    keys,
    values,
    tile,
    stop,
    position,
    highest,
    total,
    sums,
    key_row,
    value_row,
    window,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile of keys more. Softmax on the way, in powers of 2: the highest score, the sum of the shares, that of the
    values. WHOLE: every row sees every key of it."""
    n, d, e = tl.arange(0, TILE), tl.arange(0, WIDTH_PAD), tl.arange(0, VALUE_PAD)
    keys += tile * key_row.to(tl.int64)
    values += tile * value_row.to(tl.int64)
    has_key, has_value = (d < WIDTH)[None, :], (e < VALUE_WIDTH)[None, :]
    if not WHOLE:
        there = (tile + n < stop)[:, None]
        has_key, has_value = has_key & there, has_value & there
    k = tl.load(keys + n[:, None] * key_row + d[None, :], mask=has_key, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_SOFTCAP:
        score = softcap * LOG2E * (2 * tl.sigmoid(2 * scale / softcap * score) - 1)
    else:
        score *= scale * LOG2E
    if not WHOLE:
        seen = (tile + n)[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen &= (tile + n)[None, :] > position[:, None] - window
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(highest, tl.max(score, 1))
    # A row that has seen nothing yet has shares of nothing.
    base = tl.where(higher == float("-inf"), 0.0, higher) if HAS_WINDOW else higher
    shares = tl.exp2(score - base[:, None])
    kept = tl.exp2(highest - base)
    total = total * kept + tl.sum(shares, 1)
    v = tl.load(values + n[:, None] * value_row + e[None, :], mask=has_value, other=0.0)
    sums = sums * kept[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
    return higher, total, sums


@triton.jit(do_not_specialize=["window"])
def _attend(
    query,
    keys,
    values,
    query_starts,
    key_starts,
    key_lens,
    sinks,
    out,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    text, kv_head = tl.program_id(2), tl.program_id(1)
    begin = tl.load(query_starts + text)
    count = tl.load(query_starts + text + 1) - begin
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # those with the most keys begin first
    if row >= count * GROUPS:
        return
    length = tl.load(key_lens + text)
    at = tl.load(key_starts + text).to(tl.int64)
    keys += at * key_row + kv_head * key_head
    values += at * value_row + kv_head * value_head

    r, d, e = row + tl.arange(0, ROWS), tl.arange(0, WIDTH_PAD), tl.arange(0, VALUE_PAD)
    asks = r < count * GROUPS
    token = tl.minimum(r // GROUPS, count - 1)
    position = length - count + token
    head = kv_head * GROUPS + r % GROUPS
    line = (begin + token).to(tl.int64)
    q = tl.load(
        query + line[:, None] * query_row + head[:, None] * query_head + d[None, :],
        mask=asks[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    sums = tl.full([ROWS, VALUE_PAD], 0.0, tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0

    first = length - count + row // GROUPS  # of the new tokens
    stop = length - count + tl.minimum((row + ROWS - 1) // GROUPS, count - 1) + 1
    whole_stop = (first + 1) // TILE * TILE  # up to here all rows see each key that lies inside all their windows
    whole = 0
    if HAS_WINDOW:
        start = tl.maximum(first + 1 - window, 0) // TILE * TILE
        whole = tl.minimum((tl.maximum(stop - window, 0) + TILE - 1) // TILE * TILE, whole_stop)
        for tile in range(start, whole, TILE):
            highest, total, sums = _read(
                q, keys, values, tile, stop, position, highest, total, sums, key_row, value_row, window, scale, softcap,
                WIDTH, WIDTH_PAD, VALUE_WIDTH, VALUE_PAD, TILE, HAS_WINDOW, HAS_SOFTCAP, WHOLE=False,
            )  # fmt: skip
    for tile in range(whole, whole_stop, TILE):
        highest, total, sums = _read(
            q, keys, values, tile, stop, position, highest, total, sums, key_row, value_row, window, scale, softcap,
            WIDTH, WIDTH_PAD, VALUE_WIDTH, VALUE_PAD, TILE, HAS_WINDOW, HAS_SOFTCAP, WHOLE=True,
        )  # fmt: skip
    for tile in range(whole_stop, stop, TILE):
        highest, total, sums = _read(
            q, keys, values, tile, stop, position, highest, total, sums, key_row, value_row, window, scale, softcap,
            WIDTH, WIDTH_PAD, VALUE_WIDTH, VALUE_PAD, TILE, HAS_WINDOW, HAS_SOFTCAP, WHOLE=False,
        )  # fmt: skip
    to = out + (line * KV_HEADS * GROUPS + head)[:, None] * VALUE_WIDTH + e[None, :]
    found = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(to, found, mask=asks[:, None] & (e < VALUE_WIDTH)[None, :])


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `steer_ops.varlen_attention`. Starts and lengths are on the device, and not checked."""
    _, heads, width = query.shape
    _, kv_heads, value_width = values.shape
    _check(query, keys, values, query_starts, key_starts, key_lens, window, sinks)
    out = query.new_empty(len(query), heads, value_width)
    texts = len(key_lens)
    if not len(query) or not texts:
        return out
    query, keys, values = dense_rows(query), dense_rows(keys), dense_rows(values)
    width_pad, value_pad = (max(SMALLEST_DOT, triton.next_power_of_2(wide)) for wide in (width, value_width))
    rows, tile = tile_sizes(width_pad, value_pad, query.itemsize, shared_memory(query.device))
    groups = heads // kv_heads
    with on_device_of(query):
        _attend[triton.cdiv(most_queries * groups, rows), kv_heads, texts](
            query,
            keys,
            values,
            query_starts,
            key_starts,
            key_lens,
            query if sinks is None else sinks.contiguous(),
            out,
            *query.stride()[:2],
            *keys.stride()[:2],
            *values.stride()[:2],
            window or 2**31 - 1,
            scale,
            softcap or 0.0,
            KV_HEADS=kv_heads,
            GROUPS=groups,
            WIDTH=width,
            WIDTH_PAD=width_pad,
            VALUE_WIDTH=value_width,
            VALUE_PAD=value_pad,
            ROWS=rows,
            TILE=tile,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            num_warps=8 if rows >= WIDE_ROWS else 4,
            num_stages=STAGES,
        )
    return out


def tile_sizes(width: int, value_width: int, itemsize: int, memory: int) -> tuple[int, int]:
    """Rows of a program, and keys that it reads at once: the most for which there are so many bytes of memory."""
    rows, tile = (ROWS, TILE) if itemsize == 2 else (WIDE_ROWS, WIDE_TILE)
    row, token = width * itemsize, (width + value_width) * itemsize
    while rows * row + STAGES * tile * token > memory and max(rows, tile) > SMALLEST_DOT:
        if rows > tile:
            rows //= 2
        else:
            tile //= 2
    return rows, tile


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    key_lens: Tensor,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    op = "varlen_attention"
    _, heads, width = query.shape
    tokens, kv_heads, key_width = keys.shape
    check(
        key_width == width
        and values.shape[:2] == (tokens, kv_heads)
        and kv_heads > 0
        and heads % kv_heads == 0
        and len(query_starts) == len(key_starts) == len(key_lens) + 1,
        op,
        "shapes do not fit each other",
    )
    check(keys.dtype == values.dtype == query.dtype, op, "queries, keys and values have one dtype")
    places = query_starts, key_starts, key_lens
    check(all(one.dtype == torch.int32 and one.is_contiguous() for one in places), op, "starts and lengths are int32")
    check(window is None or window > 0, op, "window is at least 1")
    check(sinks is None or sinks.shape == (heads,), op, "sinks are one number for each head")
