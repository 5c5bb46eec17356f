"""Decode attention over block tables: one new token in each row, over the keys and values of its own row.

A program has one key head of one row, with all query heads that share it, and the row's keys or a part of them; a
second kernel joins the parts. How far a row is read is its length in the device's memory: a captured launch serves
texts of any length. So it is lengths, too, that say which rows have parts: a launch has a program for each row and
head, and for each head so many more as keep the processors busy. These go to the rows with the most keys, so that no
program reads more than its share of all keys (`_share`). Every program finds out for itself whose keys it has; those
that are left over end at once. A row's first program also has the new token: it takes its key and value from the
arguments and writes them into the caches, so that nobody waits for what another program writes. Where cosines and sines
are given, every program turns its own queries as it reads them, and the first one the new key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of, processors, shared_memory
from steer_ops.cuda.rotary import check_turns, load_turned

LOG2E = tl.constexpr(1.4426950408889634)
TILE, SMALLEST_TILE = 64, 16  # keys that a program reads at once
NO_WINDOW = 2**31 - 1
SMALLEST_DOT = 16  # rows of a matrix product
PROGRAMS = 4  # for each of the device's processors, beside one for each row and head
LEAST_TILES = 2  # of a part of a row
LANES = 256  # rows whose lengths a program reads at once
JOINED = 32  # parts that a program joins at once
# Of the loop over tiles: so many that two tiles of keys and values are on their way, behind the look-up of blocks.
STAGES, BUFFERS = 5, 2


@triton.jit
def _tiles(lengths, row, there, window, TILE: tl.constexpr):
    """Of rows, where they are `there`: the position of the new token, the first key that it sees, and over how many
    tiles those before it lie, from the beginning of a tile on."""
    last = tl.load(lengths + row, mask=there, other=1) - 1
    first = tl.maximum(last + 1 - window, 0)
    return last, first, (last - first // TILE * TILE + TILE - 1) // TILE


@triton.jit
def _share(lengths, rows, extras, window, TILE: tl.constexpr, LEAST_TILES: tl.constexpr, LANES: tl.constexpr):
    """How many tiles a program reads at most, so that `extras` are enough beside one for each row: a row of so many
    tiles has (tiles - 1) // share more, of all rows together at most all tiles // share."""
    every = 0
    for start in range(0, rows, LANES):
        row = start + tl.arange(0, LANES)
        _, _, tiles = _tiles(lengths, row, row < rows, window, TILE)
        every += tl.sum(tiles, 0)
    return tl.maximum((every + extras - 1) // extras, LEAST_TILES)


@triton.jit
def _extra(item, share, lengths, rows, window, TILE: tl.constexpr, LANES: tl.constexpr):
    """The row of one of the `extras`, and which part of its keys it has, from 1 on; row `rows`: nothing is left."""
    found, before, ended = 0, 0, 0
    for start in range(0, rows, LANES):
        row = start + tl.arange(0, LANES)
        _, _, tiles = _tiles(lengths, row, row < rows, window, TILE)
        more = tl.maximum(tiles - 1, 0) // share
        ends = ended + tl.cumsum(more, 0)
        others = (ends <= item) & (row < rows)
        found += tl.sum(others.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(others, ends, 0), 0))
        ended += tl.sum(more, 0)
    return found, item - before + 1


@triton.jit
def _extras_before(row, share, lengths, window, TILE: tl.constexpr, LANES: tl.constexpr):
    """How many of the `extras` the rows before a row have."""
    found = 0
    for start in range(0, row, LANES):
        other = start + tl.arange(0, LANES)
        _, _, tiles = _tiles(lengths, other, other < row, window, TILE)
        found += tl.sum(tl.maximum(tiles - 1, 0) // share, 0)
    return found


@triton.jit(do_not_specialize=["table_row", "window", "rows", "extras"])
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
    rows,
    extras,
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
    LEAST_TILES: tl.constexpr,
    LANES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    kv_head, item = tl.program_id(0), tl.program_id(1)
    row, part, share = item - extras, 0, LEAST_TILES
    if item < extras:  # these first: they have the most to do
        share = _share(lengths, rows, extras, window, TILE, LEAST_TILES, LANES)
        row, part = _extra(item, share, lengths, rows, window, TILE, LANES)
    if row >= rows:
        return
    last, first, tiles = _tiles(lengths, row, True, window, TILE)
    if (part == 0) & (tiles > LEAST_TILES):
        share = _share(lengths, rows, extras, window, TILE, LEAST_TILES, LANES)
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
    if part == 0:
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
            scaled = tl.exp2(own - highest)
            total = scaled + tl.exp2(sink - highest)
            sums += scaled[:, None] * new_value.to(tl.float32)[None, :]
        else:
            sums += new_value.to(tl.float32)[None, :]

    start = first // TILE * TILE + part * share * TILE
    stop = tl.minimum(start + share * TILE, last)
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

    found = sums / total[:, None]
    to = asks[:, None] & has_value[None, :]
    if tiles <= share:
        asked = row.to(tl.int64) * KV_HEADS * GROUPS + head
        tl.store(out + asked[:, None] * VALUE_WIDTH + e[None, :], found.to(out.dtype.element_ty), mask=to)
    else:
        line = tl.where(part == 0, row, rows + item).to(tl.int64) * KV_HEADS * GROUPS + head
        tl.store(parts + line[:, None] * VALUE_WIDTH + e[None, :], found, mask=to)
        tl.store(logs + line, highest + tl.log2(total), mask=asks)


@triton.jit(do_not_specialize=["rows", "extras", "window"])
def _join(
    parts,
    logs,
    lengths,
    out,
    rows,
    extras,
    window,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    LANES: tl.constexpr,
    JOINED: tl.constexpr,
):
    """A head of a row, where that has several parts: its first one, and those that follow those of the rows before."""
    head, row = tl.program_id(0), tl.program_id(1)
    _, _, tiles = _tiles(lengths, row, True, window, TILE)
    if tiles <= LEAST_TILES:
        return
    share = _share(lengths, rows, extras, window, TILE, LEAST_TILES, LANES)
    count = 1 + (tiles - 1) // share
    if count == 1:
        return
    item = _extras_before(row, share, lengths, window, TILE, LANES)
    e = tl.arange(0, VALUE_PAD)
    has_value = e < VALUE_WIDTH
    highest, total, sums = float("-inf"), 0.0, tl.full([VALUE_PAD], 0.0, tl.float32)
    for start in range(0, count, JOINED):
        p = start + tl.arange(0, JOINED)
        there = p < count
        line = tl.where(p == 0, row, rows + item + p - 1).to(tl.int64) * HEADS + head
        log = tl.load(logs + line, mask=there, other=float("-inf"))
        at = parts + line[:, None] * VALUE_WIDTH + e[None, :]
        values = tl.load(at, mask=there[:, None] & has_value[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(log, 0))
        weight, kept = tl.exp2(log - higher), tl.exp2(highest - higher)
        total = total * kept + tl.sum(weight, 0)
        sums = sums * kept + tl.sum(values * weight[:, None], 0)
        highest = higher
    asked = row.to(tl.int64) * HEADS + head
    tl.store(out + asked * VALUE_WIDTH + e, (sums / total).to(out.dtype.element_ty), mask=has_value)


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
    most_tiles = -(-block_tables.shape[1] * block_size // tile)
    extras = num_extras(rows, kv_heads, most_tiles, processors(query.device))
    parts = torch.empty((rows + extras) * heads, value_width, dtype=torch.float32, device=out.device)
    logs = torch.empty((rows + extras) * heads, dtype=torch.float32, device=out.device)
    parting = {"TILE": tile, "LEAST_TILES": LEAST_TILES, "LANES": LANES}
    with on_device_of(query):
        _attend[kv_heads, extras + rows](
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
            rows,
            extras,
            window or NO_WINDOW,
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
            **parting,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            num_stages=STAGES,
        )
        if extras:
            sizes = {"HEADS": heads, "VALUE_WIDTH": value_width, "VALUE_PAD": value_pad, "JOINED": JOINED}
            _join[heads, rows](
                parts,
                logs,
                context_lens,
                out,
                rows,
                extras,
                window or NO_WINDOW,
                **sizes,
                **parting,
                num_warps=2,
            )


def num_extras(rows: int, kv_heads: int, tiles: int, processors: int) -> int:
    """Programs of a key head beside one for each row; none where no row can have two parts. tiles: of the longest row
    that its table has room for."""
    if tiles <= LEAST_TILES:
        return 0
    return min(-(-PROGRAMS * processors // kv_heads), rows * -(-tiles // LEAST_TILES))


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
