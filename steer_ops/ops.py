"""The ops: what each computes, its schema, and the numbers that its kernels are tried on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from steer_ops import plain
from steer_ops.registry import Op

Example = tuple[tuple[Any, ...], dict[str, Any]]


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
) -> None:
    """Decode attention: one new token in each of R rows, over the keys and values of its own row, in blocks.

    Writes each new key and value into the caches, at position `context_lens - 1` of its row, then attends over the
    positions 0 to `context_lens - 1`, or the last `window` of them. Computed in float32. With a kernel no row is read
    further than its length, and what a row gets is the same in every bit beside any other rows.

    query [R, heads, width], key [R, kv_heads, width], value [R, kv_heads, value_width]: of the new tokens; `heads /
    kv_heads` query heads share a key head. key_cache [num_blocks, kv_heads, block_size, width], value_cache
    [num_blocks, kv_heads, block_size, value_width]: contiguous, written to. block_tables [R, max_blocks] int32: the
    blocks of each row; entries beyond them are not read. context_lens [R] int32: tokens of each row, the new one
    included, at least 1. out [R, heads, value_width]: contiguous, written to. scale: of scores. softcap: scores become
    softcap * tanh(score / softcap). sinks [heads], of any dtype: a score that takes its share and gives nothing.

    All tensors but the tables, lengths and sinks have one dtype. The kernel raises RuntimeError where shapes, dtypes,
    lengths or blocks do not fit.
    """
    PAGED_ATTENTION_DECODE.for_tensor(query)(
        query,
        key,
        value,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        out,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def _paged_attention_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 1, 4], dtype=torch.int32)
    tables = torch.tensor([[3, 0, 2], [5, -1, -1], [1, -1, -1]], dtype=torch.int32)
    for width, value_width in ((64, 64), (24, 8)):
        query, key, value, key_cache, value_cache = (
            torch.randn(*shape, generator=random).to(dtype)
            for shape in ((3, 4, width), (3, 2, width), (3, 2, value_width), (6, 2, 4, width), (6, 2, 4, value_width))
        )
        args = query, key, value, key_cache, value_cache, tables, lengths, query.new_zeros(3, 4, value_width)
        yield args, {"scale": 0.2}
        yield args, {"scale": 0.2, "window": 3, "softcap": 2.0, "sinks": torch.randn(4, generator=random)}


PAGED_ATTENTION_DECODE = Op(
    "paged_attention_decode(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor block_tables, Tensor context_lens, Tensor(c!) out, *, float scale, int? window=None, float? softcap=None, "
    "Tensor? sinks=None) -> ()",
    plain.paged_attention_decode,
    _paged_attention_examples,
)
