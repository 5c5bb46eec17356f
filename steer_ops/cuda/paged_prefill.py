"""Attention of chunks of texts over block tables, in one launch: each chunk's tokens are the last of its text so far.

A program has some rows of one chunk and one key head; a row is a token's head, so that the query heads that share a key
head share what is read of it. It reads keys from the first that one of its rows sees to the last, tile by tile, and
compares positions only in tiles that not all of its rows see whole. Where chunks begin, and how far they are read, is
in the device's memory: a captured launch serves any chunks of so many tokens together. Which chunk a program's rows are
of, it looks up; there are as many programs as so many tokens and chunks can need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of, shared_memory
from steer_ops.cuda.paged_attention import BUFFERS, LOG2E, SMALLEST_DOT

ROWS, TILE = 128, 64  # of a program, and keys that it reads at once, at most
WIDE_ROWS, WIDE_TILE = 32, 32  # of float32, whose products keep all that they read in registers
# Of the loop over tiles: so many that two tiles of keys and values are on their way, behind the look-up of blocks.
STAGES = 4


@triton.jit
def _read(
    q,
    table,
    key_cache,
    value_cache,
    tile,
    stop,
    position,
    highest,
    total,
    sums,
    kv_head,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile of keys more. Softmax on the way, in powers of 2: the highest score, the sum of the shares, that of the
    values. WHOLE: every row sees every key of it."""
    n, d, e = tl.arange(0, TILE), tl.arange(0, WIDTH_PAD), tl.arange(0, VALUE_PAD)
    there = tile + n < stop
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + tile // BLOCK_SIZE).to(tl.int64)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + tile % BLOCK_SIZE + n
    elif WHOLE:
        block = tl.load(table + (tile + n) // BLOCK_SIZE).to(tl.int64)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + (tile + n) % BLOCK_SIZE
    else:
        block = tl.load(table + (tile + n) // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + (tile + n) % BLOCK_SIZE
    has_key, has_value = (d < WIDTH)[None, :], (e < VALUE_WIDTH)[None, :]
    if not WHOLE:
        has_key, has_value = has_key & there[:, None], has_value & there[:, None]
    k = tl.load(key_cache + line[:, None] * WIDTH + d[None, :], mask=has_key, other=0.0)
    v = tl.load(value_cache + line[:, None] * VALUE_WIDTH + e[None, :], mask=has_value, other=0.0)
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
    sums = sums * kept[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
    return higher, total, sums


@triton.jit(do_not_specialize=["table_row", "window", "chunks"])
def _attend(
    query,
    key_cache,
    value_cache,
    tables,
    query_starts,
    lengths,
    sinks,
    out,
    query_row,
    query_head,
    table_row,
    chunks,
    window,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    program, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the last of a chunk read the most
    # Chunk i has the programs from `query_starts[i] * GROUPS // ROWS + i` on: those are enough for it.
    chunk, beyond = 0, chunks
    while beyond - chunk > 1:
        middle = (chunk + beyond) // 2
        before = tl.load(query_starts + middle) * GROUPS // ROWS + middle <= program
        chunk = tl.where(before, middle, chunk)
        beyond = tl.where(before, beyond, middle)
    begin = tl.load(query_starts + chunk)
    count = tl.load(query_starts + chunk + 1) - begin
    row = (program - begin * GROUPS // ROWS - chunk) * ROWS
    if (row < 0) | (row >= count * GROUPS):  # tokens before the first chunk are no chunk's
        return
    length = tl.load(lengths + chunk)
    table = tables + chunk * table_row.to(tl.int64)

    r, d, e = row + tl.arange(0, ROWS), tl.arange(0, WIDTH_PAD), tl.arange(0, VALUE_PAD)
    asks = r < count * GROUPS
    token = tl.minimum(r // GROUPS, count - 1)
    position = length - count + token
    head = kv_head * GROUPS + r % GROUPS
    at = (begin + token).to(tl.int64)
    q = tl.load(
        query + at[:, None] * query_row + head[:, None] * query_head + d[None, :],
        mask=asks[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    sums = tl.full([ROWS, VALUE_PAD], 0.0, tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0

    first = length - count + row // GROUPS  # of the rows' tokens, its position
    stop = length - count + tl.minimum((row + ROWS - 1) // GROUPS, count - 1) + 1
    whole_stop = (first + 1) // TILE * TILE  # up to here all rows see each key that lies inside all their windows
    whole = 0
    if HAS_WINDOW:
        start = tl.maximum(first + 1 - window, 0) // TILE * TILE
        whole = tl.minimum((tl.maximum(stop - window, 0) + TILE - 1) // TILE * TILE, whole_stop)
        for tile in range(start, whole, TILE):
            highest, total, sums = _read(
                q, table, key_cache, value_cache, tile, stop, position, highest, total, sums, kv_head, window, scale,
                softcap, KV_HEADS, WIDTH, WIDTH_PAD, VALUE_WIDTH, VALUE_PAD, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP,
                WHOLE=False,
            )  # fmt: skip
    for tile in range(whole, whole_stop, TILE):
        highest, total, sums = _read(
            q, table, key_cache, value_cache, tile, stop, position, highest, total, sums, kv_head, window, scale,
            softcap, KV_HEADS, WIDTH, WIDTH_PAD, VALUE_WIDTH, VALUE_PAD, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP,
            WHOLE=True,
        )  # fmt: skip
    for tile in range(whole_stop, stop, TILE):
        highest, total, sums = _read(
            q, table, key_cache, value_cache, tile, stop, position, highest, total, sums, kv_head, window, scale,
            softcap, KV_HEADS, WIDTH, WIDTH_PAD, VALUE_WIDTH, VALUE_PAD, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_SOFTCAP,
            WHOLE=False,
        )  # fmt: skip
    to = out + (at * KV_HEADS * GROUPS + head)[:, None] * VALUE_WIDTH + e[None, :]
    found = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(to, found, mask=asks[:, None] & (e < VALUE_WIDTH)[None, :])


def paged_attention_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """See `steer_ops.paged_attention_prefill`. Tables, starts and lengths are on the device, and not checked."""
    tokens, heads, width = query.shape
    _, kv_heads, block_size, value_width = value_cache.shape
    _check(query, key_cache, value_cache, block_tables, query_starts, context_lens, out, window, sinks)
    chunks = len(context_lens)
    if not tokens or not chunks:
        return
    query = dense_rows(query)
    width_pad, value_pad = (max(SMALLEST_DOT, triton.next_power_of_2(wide)) for wide in (width, value_width))
    rows, tile = tile_sizes(width_pad, value_pad, query.itemsize, shared_memory(query.device))
    groups = heads // kv_heads
    with on_device_of(query):
        _attend[tokens * groups // rows + chunks, kv_heads](
            query,
            key_cache,
            value_cache,
            block_tables,
            query_starts,
            context_lens,
            query if sinks is None else sinks.contiguous(),
            out,
            *query.stride()[:2],
            block_tables.stride(0),
            chunks,
            window or 2**31 - 1,
            scale,
            softcap or 0.0,
            KV_HEADS=kv_heads,
            GROUPS=groups,
            WIDTH=width,
            WIDTH_PAD=width_pad,
            VALUE_WIDTH=value_width,
            VALUE_PAD=value_pad,
            BLOCK_SIZE=block_size,
            ROWS=rows,
            TILE=tile,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            num_warps=8 if rows >= WIDE_ROWS else 4,
            num_stages=STAGES,
        )


def tile_sizes(width: int, value_width: int, itemsize: int, memory: int) -> tuple[int, int]:
    """Rows of a program, and keys that it reads at once: the most for which there are so many bytes of memory."""
    rows, tile = (ROWS, TILE) if itemsize == 2 else (WIDE_ROWS, WIDE_TILE)
    row, token = width * itemsize, (width + value_width) * itemsize
    while rows * row + BUFFERS * tile * token > memory and max(rows, tile) > SMALLEST_DOT:
        if rows > tile:
            rows //= 2
        else:
            tile //= 2
    return rows, tile


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    op = "paged_attention_prefill"
    tokens, heads, width = query.shape
    blocks, kv_heads, block_size, value_width = value_cache.shape
    check(
        key_cache.shape == (blocks, kv_heads, block_size, width)
        and out.shape == (tokens, heads, value_width)
        and block_tables.dim() == 2
        and len(block_tables) == len(context_lens) == len(query_starts) - 1
        and kv_heads > 0
        and heads % kv_heads == 0,
        op,
        "shapes do not fit each other",
    )
    check(
        {part.dtype for part in (key_cache, value_cache, out)} == {query.dtype},
        op,
        "queries, keys, values and out have one dtype",
    )
    numbers = block_tables, query_starts, context_lens
    check(all(one.dtype == torch.int32 for one in numbers), op, "block_tables, query_starts and context_lens are int32")
    contiguous = all(part.is_contiguous() for part in (key_cache, value_cache, out, query_starts, context_lens))
    check(
        contiguous and (block_tables.stride(1) == 1 or block_tables.shape[1] <= 1),
        op,
        "the caches, out, block_tables, query_starts and context_lens are contiguous",
    )
    check(window is None or window > 0, op, "window is at least 1")
    check(sinks is None or sinks.shape == (heads,), op, "sinks are one number for each head")
