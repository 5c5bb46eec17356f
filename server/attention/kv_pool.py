"""One layer's keys and values of all blocks, on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer_ops import (
    COPY_KV,
    GATHER_KV,
    PAGED_ATTENTION_DECODE,
    PAGED_ATTENTION_PREFILL,
    VARLEN_ATTENTION,
    WRITE_KV,
    Heads,
    Op,
    plain,
)
from steer_ops.cuda.flash import takes as varlen_takes

SCRATCH_BYTES = 256 * 2**20  # that attention to prompts takes at a time, beside the keys and values of one text


@dataclass(frozen=True)
class KVShape:
    """One layer's keys and values of one token."""

    heads: int
    key: int  # width of a head
    value: int
    dtype: torch.dtype
    device: torch.device
    groups: int = 1  # query heads that share a head

    @property
    def bytes(self) -> int:
        return self.heads * (self.key + self.value) * self.dtype.itemsize


@dataclass(frozen=True)
class KVOps:
    """How keys and values in blocks are written and attended to: ops of `steer_ops`, or their references in PyTorch."""

    decode: Callable[..., None] = plain.paged_attention_decode  # single tokens
    write: Callable[..., None] = plain.write_kv
    gather: Callable[..., tuple[Tensor, Tensor]] = plain.gather_kv
    copy: Callable[..., None] = plain.copy_kv  # blocks to others, in several layers
    # All chunks of a pass in one call: over keys side by side, which is faster, without caps and sinks; over blocks, by
    # all rules. None: one chunk after the other.
    varlen: Callable[..., Tensor] | None = None
    prefill: Callable[..., None] | None = None

    @classmethod
    def of(cls, shape: KVShape, block_size: int) -> "KVOps":
        """Kernels, as far as there are some that have been tried on such keys and values."""
        heads = Heads(shape.heads, shape.groups, shape.key, shape.value, block_size)

        def kernel(op: Op) -> Callable[..., Any] | None:
            found = op.choose_for(shape.device, shape.dtype, heads)
            return None if found is op.reference else found

        return cls(
            kernel(PAGED_ATTENTION_DECODE) or cls.decode,
            kernel(WRITE_KV) or cls.write,
            kernel(GATHER_KV) or cls.gather,
            COPY_KV.choose(shape.device, shape.dtype),
            kernel(VARLEN_ATTENTION) if varlen_takes(shape.key, shape.value, shape.dtype) else None,
            kernel(PAGED_ATTENTION_PREFILL),
        )

    @property
    def by_length(self) -> bool:
        """Whether single tokens are attended to each to its own length."""
        return self.decode is not plain.paged_attention_decode


@dataclass(frozen=True)
class KVPool:
    """keys [blocks, heads, block size, width], values [blocks, heads, block size, value width]: within a block the
    tokens of a head lie side by side, so that attention reads them in one go. Who reads it reads no further than a
    sequence's length: what lies beyond may be anything, also no number."""

    keys: Tensor
    values: Tensor
    ops: KVOps

    @classmethod
    def of(cls, shape: KVShape, num_blocks: int, block_size: int, ops: KVOps) -> "KVPool":
        keys, values = (
            torch.zeros(num_blocks, shape.heads, block_size, width, dtype=shape.dtype, device=shape.device)
            for width in (shape.key, shape.value)
        )
        return cls(keys, values, ops)

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def write(self, places: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [heads, N, width]; places [N, 2] int64: the block of each token, and its place in there."""
        places = places.to(self.keys.device)
        self.ops.write(key.transpose(0, 1), value.transpose(0, 1), self.keys, self.values, places)

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, blocks * block size, width] of the blocks [n] of one sequence. Copies."""
        blocks = blocks.to(self.keys.device)
        # Whole blocks first: PyTorch would copy all of a pool that is not contiguous before it selects.
        keys, values = (cache.index_select(0, blocks).transpose(0, 1) for cache in (self.keys, self.values))
        return keys.flatten(1, 2), values.flatten(1, 2)
