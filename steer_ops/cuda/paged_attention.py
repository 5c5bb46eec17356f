"""Decode attention over block tables: one new token in each row, over the keys and values of its own row.

A program has one key head of one row, with all query heads that share it, and one of `SPLITS` parts of the row's keys;
a second kernel joins the parts. How far a row is read is its length in the device's memory: a captured launch serves
texts of any length. Program 0 of a row and head also has the new token: it takes its key and value from the arguments
and writes them into the caches, so that nobody waits for what another program writes. Where cosines and sines are
given, every program turns its own queries as it reads them, and program 0 the new key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of, processors, shared_memory
from steer_ops.cuda.rotary import check_turns, load_turned

LOG2E = tl.constexpr(1.4426950408889634)
TILE, SMALLEST_TILE = 64, 16  # keys that a program reads at once
SMALLEST_DOT = 16  # rows of a matrix product
MOST_SPLITS = 64
PROGRAMS = 2  # for each of the device's processors, at least, where rows are few
# Of the loop over tiles: so many that two tiles of keys and values are on their way, behind the look-up of blocks.
STAGES, BUFFERS = 5, 2


@triton.jit(do_not_specialize=["table_row", "window"])
def _attend(
    query,
    key,
    value,
    key_cache,
    value_cache,
    tables,
    lengths,
    sinks,
    cos,
    sin,
    out,
    parts,
    logs,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    table_row,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TURNED: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    last = tl.load(lengths + row) - 1  # position of the new token
    table = tables + row.to(tl.int64) * table_row
    g, n = tl.arange(0, GROUPS_PAD), tl.arange(0, TILE)
    d, e = tl.arange(0, WIDTH_PAD), tl.arange(0, VALUE_PAD)
    head = kv_head * GROUPS + g
    asks, has_key, has_value = g < GROUPS, d < WIDTH, e < VALUE_WIDTH
    cos += row.to(tl.int64) * TURNED
    sin += row.to(tl.int64) * TURNED
    at = query + row.to(tl.int64) * query_row + head[:, None] * query_head
    q = load_turned(at, d[None, :], asks[:, None] & has_key[None, :], cos, sin, TURNED)

    # Softmax on the way, in powers of 2: the highest score, the sum of the shares, the sum of the values.
    highest = tl.full([GROUPS_PAD], float("-inf"), tl.float32)
    total = tl.full([GROUPS_PAD], 0.0, tl.float32)
    sums = tl.full([GROUPS_PAD, VALUE_PAD], 0.0, tl.float32)
    if split == 0:
        new_key = load_turned(key + row.to(tl.int64) * key_row + kv_head * key_head, d, has_key, cos, sin, TURNED)
        new_value = tl.load(value + row.to(tl.int64) * value_row + kv_head * value_head + e, mask=has_value, other=0.0)
        line = (tl.load(table + last // BLOCK_SIZE).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + last % BLOCK_SIZE
        tl.store(key_cache + line * WIDTH + d, new_key, mask=has_key)
        tl.store(value_cache + line * VALUE_WIDTH + e, new_value, mask=has_value)
        score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        if HAS_SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        highest = score * LOG2E
        total += 1.0
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=asks, other=0.0).to(tl.float32) * LOG2E
            own = highest
            highest = tl.maximum(own, sink)
            share = tl.exp2(own - highest)
            total = share + tl.exp2(sink - highest)
            sums += share[:, None] * new_value.to(tl.float32)[None, :]
        else:
            sums += new_value.to(tl.float32)[None, :]

    first = tl.maximum(last + 1 - window, 0)
    begin = first // TILE * TILE
    each = (last - begin + TILE * SPLITS - 1) // (TILE * SPLITS) * TILE
    start = begin + split * each
    stop = tl.minimum(start + each, last)
    for tile in range(start, stop, TILE):
        position = tile + n
        seen = (position >= first) & (position < stop)
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table + tile // BLOCK_SIZE).to(tl.int64)
            line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + tile % BLOCK_SIZE + n
        else:
            block = tl.load(table + position // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
        keys = tl.load(key_cache + line[:, None] * WIDTH + d[None, :], mask=seen[:, None] & has_key[None, :], other=0.0)
        values = tl.load(
            value_cache + line[:, None] * VALUE_WIDTH + e[None, :], mask=seen[:, None] & has_value[None, :], other=0.0
        )
        score = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        score = tl.where(seen[None, :], score * LOG2E, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        shares = tl.exp2(score - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(shares, 1)
        sums = sums * kept[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        highest = higher

    asked = row.to(tl.int64) * KV_HEADS * GROUPS + head
    if SPLITS == 1:
        found = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + asked[:, None] * VALUE_WIDTH + e[None, :], found, mask=asks[:, None] & has_value[None, :])
    else:
        part = asked * SPLITS + split
        weight = tl.where(total == 0, 1.0, total)  # nothing was read: no share, whatever the sum
        tl.store(
            parts + part[:, None] * VALUE_WIDTH + e[None, :],
            sums / weight[:, None],
            mask=asks[:, None] & has_value[None, :],
        )
        tl.store(logs + part, tl.where(total == 0, float("-inf"), highest + tl.log2(weight)), mask=asks)


@triton.jit
def _join(parts, logs, out, VALUE_WIDTH: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr):
    asked = tl.program_id(0).to(tl.int64)  # a head of a row
    s, e = tl.arange(0, SPLITS), tl.arange(0, VALUE_PAD)
    has_value = e < VALUE_WIDTH
    log = tl.load(logs + asked * SPLITS + s)
    weight = tl.exp2(log - tl.max(log, 0))
    at = parts + (asked * SPLITS + s)[:, None] * VALUE_WIDTH + e[None, :]
    part = tl.load(at, mask=has_value[None, :], other=0.0)
    found = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + asked * VALUE_WIDTH + e, found.to(out.dtype.element_ty), mask=has_value)


def paged_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """See `steer_ops.paged_attention_decode`. Lengths and blocks are on the device, and not checked."""
    rows, heads, width = query.shape
    _, kv_heads, block_size, value_width = value_cache.shape
    _check(query, key, value, key_cache, value_cache, block_tables, context_lens, out, window, sinks)
    if not rows:
        return
    turned = 0
    check((cos is None) == (sin is None), "paged_attention_decode", "cos and sin come together")
    if cos is not None and sin is not None:
        turned = check_turns("paged_attention_decode", query, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    groups = heads // kv_heads
    groups_pad = max(SMALLEST_DOT, triton.next_power_of_2(groups))
    width_pad, value_pad = (max(SMALLEST_DOT, triton.next_power_of_2(wide)) for wide in (width, value_width))
    tile = tile_size((width_pad + value_pad) * query.itemsize, shared_memory(query.device))
    splits = num_splits(rows * kv_heads, -(-block_tables.shape[1] * block_size // tile), processors(query.device))
    parts = logs = out
    if splits > 1:
        parts = torch.empty(rows * heads * splits, value_width, dtype=torch.float32, device=out.device)
        logs = torch.empty(rows * heads * splits, dtype=torch.float32, device=out.device)
    with on_device_of(query):
        _attend[rows, kv_heads, splits](
            query,
            key,
            value,
            key_cache,
            value_cache,
            block_tables,
            context_lens,
            query if sinks is None else sinks.contiguous(),
            query if cos is None else cos,
            query if sin is None else sin,
            out,
            parts,
            logs,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            block_tables.stride(0),
            window or 2**31 - 1,
            scale,
            softcap or 0.0,
            KV_HEADS=kv_heads,
            GROUPS=groups,
            GROUPS_PAD=groups_pad,
            WIDTH=width,
            WIDTH_PAD=width_pad,
            VALUE_WIDTH=value_width,
            VALUE_PAD=value_pad,
            BLOCK_SIZE=block_size,
            TURNED=turned,
            TILE=tile,
            SPLITS=splits,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            num_stages=STAGES,
        )
        if splits > 1:
            _join[rows * heads,](parts, logs, out, value_width, value_pad, splits, num_warps=2)


def num_splits(programs: int, tiles: int, processors: int) -> int:
    """Parts of a row's keys, a power of two: so many that all processors work, with `programs` rows and heads, but not
    more than the most tiles that a row can have."""
    most = min(MOST_SPLITS, triton.next_power_of_2(tiles))
    wanted = triton.next_power_of_2(-(-PROGRAMS * processors // programs))
    return int(max(1, min(most, wanted)))


def tile_size(token: int, memory: int) -> int:
    """Keys that a program reads at once. token: bytes of a token's key and value, memory: bytes for a program."""
    tile = TILE
    while tile > SMALLEST_TILE and BUFFERS * tile * token > memory:
        tile //= 2
    return tile


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    op = "paged_attention_decode"
    rows, heads, width = query.shape
    blocks, kv_heads, block_size, value_width = value_cache.shape
    shapes = (
        (key, (rows, kv_heads, width)),
        (value, (rows, kv_heads, value_width)),
        (key_cache, (blocks, kv_heads, block_size, width)),
        (out, (rows, heads, value_width)),
        (context_lens, (rows,)),
    )
    check(
        all(tensor.shape == shape for tensor, shape in shapes)
        and block_tables.dim() == 2
        and len(block_tables) == rows
        and kv_heads > 0
        and heads % kv_heads == 0,
        op,
        "shapes do not fit each other",
    )
    check(
        {part.dtype for part in (key, value, key_cache, value_cache, out)} == {query.dtype},
        op,
        "queries, keys, values and out have one dtype",
    )
    check(block_tables.dtype == context_lens.dtype == torch.int32, op, "block_tables and context_lens are int32")
    contiguous = all(part.is_contiguous() for part in (key_cache, value_cache, out, context_lens))
    check(
        contiguous and (block_tables.stride(1) == 1 or block_tables.shape[1] <= 1),
        op,
        "the caches, out, block_tables and context_lens are contiguous",
    )
    check(window is None or window > 0, op, "window is at least 1")
    check(sinks is None or sinks.shape == (heads,), op, "sinks are one number for each head")
