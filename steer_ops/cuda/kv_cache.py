"""Keys and values of tokens into blocks, those of blocks side by side, and blocks to others: in one pass each."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of

HEADS = 8  # that a program copies
NUMBERS = 1024  # of a block that a program copies at once


@triton.jit
def _copy_heads(
    source,
    target,
    source_head,
    target_head,
    first,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A token's heads, from `first` on: strides of heads, numbers of a head side by side."""
    head, d = first + tl.arange(0, HEADS), tl.arange(0, PAD)
    there = (head < KV_HEADS)[:, None] & (d < WIDTH)[None, :]
    numbers = tl.load(source + head[:, None] * source_head + d[None, :], mask=there)
    tl.store(target + head[:, None] * target_head + d[None, :], numbers, mask=there)


@triton.jit
def _write(
    key,
    value,
    key_cache,
    value_cache,
    places,
    key_row,
    key_head,
    value_row,
    value_head,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    line = tl.load(places + 2 * row).to(tl.int64) * KV_HEADS * BLOCK_SIZE + tl.load(places + 2 * row + 1)
    to, head = key_cache + line * WIDTH, BLOCK_SIZE * WIDTH
    _copy_heads(key + row * key_row, to, key_head, head, first, KV_HEADS, WIDTH, WIDTH_PAD, HEADS)
    to, head = value_cache + line * VALUE_WIDTH, BLOCK_SIZE * VALUE_WIDTH
    _copy_heads(value + row * value_row, to, value_head, head, first, KV_HEADS, VALUE_WIDTH, VALUE_PAD, HEADS)


@triton.jit
def _gather(
    key_cache,
    value_cache,
    blocks,
    keys,
    values,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    line = tl.load(blocks + token // BLOCK_SIZE).to(tl.int64) * KV_HEADS * BLOCK_SIZE + token % BLOCK_SIZE
    own, head = key_cache + line * WIDTH, BLOCK_SIZE * WIDTH
    _copy_heads(own, keys + token * KV_HEADS * WIDTH, head, WIDTH, first, KV_HEADS, WIDTH, WIDTH_PAD, HEADS)
    own, head = value_cache + line * VALUE_WIDTH, BLOCK_SIZE * VALUE_WIDTH
    to = values + token * KV_HEADS * VALUE_WIDTH
    _copy_heads(own, to, head, VALUE_WIDTH, first, KV_HEADS, VALUE_WIDTH, VALUE_PAD, HEADS)


@triton.jit
def _copy(caches, blocks, UNIT: tl.constexpr, NUMBERS: tl.constexpr):
    """A block of a cache. caches: of each the address, and how many numbers of the type UNIT a block has."""
    place, cache = tl.program_id(0), tl.program_id(1)
    start, size = tl.load(caches + 2 * cache).to(tl.pointer_type(UNIT)), tl.load(caches + 2 * cache + 1)
    own = start + tl.load(blocks + 2 * place) * size
    to = start + tl.load(blocks + 2 * place + 1) * size
    for first in range(0, size, NUMBERS):
        number = first + tl.arange(0, NUMBERS)
        tl.store(to + number, tl.load(own + number, mask=number < size), mask=number < size)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, places: Tensor) -> None:
    """See `steer_ops.write_kv`. Places are on the device, and not checked."""
    _, kv_heads, block_size, width = key_cache.shape
    check(
        key.shape == (len(places), kv_heads, width)
        and value.shape == (len(places), kv_heads, value_cache.shape[3])
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
        and places.is_contiguous()
        and {value.dtype, key_cache.dtype, value_cache.dtype} == {key.dtype},
        "write_kv",
        "shapes, layouts and dtypes do not fit each other",
    )
    if len(places):
        key, value = dense_rows(key), dense_rows(value)
        strides = *key.stride()[:2], *value.stride()[:2]
        with on_device_of(key):
            _write[len(places), -(-kv_heads // HEADS)](
                key, value, key_cache, value_cache, places, *strides, block_size, **_sizes(key_cache, value_cache)
            )


def gather_kv(key_cache: Tensor, value_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """See `steer_ops.gather_kv`. Blocks are on the device, and not checked."""
    _, kv_heads, block_size, width = key_cache.shape
    check(
        key_cache.is_contiguous() and value_cache.is_contiguous() and blocks.is_contiguous(),
        "gather_kv",
        "caches and blocks are contiguous",
    )
    tokens = len(blocks) * block_size
    keys = key_cache.new_empty(tokens, kv_heads, width)
    values = value_cache.new_empty(tokens, kv_heads, value_cache.shape[3])
    if tokens:
        with on_device_of(key_cache):
            _gather[tokens, -(-kv_heads // HEADS)](
                key_cache, value_cache, blocks, keys, values, block_size, **_sizes(key_cache, value_cache)
            )
    return keys, values


def copy_kv(caches: list[Tensor], blocks: Tensor) -> None:
    """See `steer_ops.copy_kv`. All caches in one launch. Blocks are on the device, and not checked."""
    check(
        all(cache.is_contiguous() and cache.device == blocks.device for cache in caches)
        and blocks.is_contiguous()
        and blocks.dtype == torch.int64,
        "copy_kv",
        "caches and blocks are contiguous, on one device, and blocks int64",
    )
    sizes = [cache[0].nbytes for cache in caches]
    unit = 8 if all(size % 8 == 0 for size in sizes) else 2  # bytes
    table = tuple(
        number for cache, size in zip(caches, sizes, strict=True) for number in (cache.data_ptr(), size // unit)
    )
    if len(blocks) and table:
        there, kind = _on_device(table, blocks.device), tl.int64 if unit == 8 else tl.int16
        with on_device_of(blocks):
            _copy[len(blocks), len(caches)](there, blocks, kind, NUMBERS)


@lru_cache(maxsize=8)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """[N] int64, uploaded once: caches stay where they are."""
    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _sizes(key_cache: Tensor, value_cache: Tensor) -> dict[str, int]:
    width, value_width = key_cache.shape[3], value_cache.shape[3]
    return {
        "KV_HEADS": key_cache.shape[1],
        "WIDTH": width,
        "WIDTH_PAD": triton.next_power_of_2(width),
        "VALUE_WIDTH": value_width,
        "VALUE_PAD": triton.next_power_of_2(value_width),
        "HEADS": HEADS,
    }
