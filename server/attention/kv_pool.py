"""One layer's keys and values of all blocks, on the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from server.attention.layout import BlockCopy


@dataclass(frozen=True)
class KVShape:
    """One layer's keys and values of one token."""

    heads: int
    key: int  # width of a head
    value: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.heads * (self.key + self.value) * self.dtype.itemsize


@dataclass(frozen=True)
class KVPool:
    """keys [blocks, heads, block size, width], values [blocks, heads, block size, value width]: within a block the
    tokens of a head lie side by side, so that attention reads them in one go. Who reads it reads no further than a
    sequence's length: what lies beyond may be anything, also no number."""

    keys: Tensor
    values: Tensor
    decode: Callable[..., None]  # how single tokens attend to them: see `steer_ops.paged_attention_decode`

    @classmethod
    def of(cls, shape: KVShape, num_blocks: int, block_size: int, decode: Callable[..., None]) -> "KVPool":
        keys, values = (
            torch.zeros(num_blocks, shape.heads, block_size, width, dtype=shape.dtype, device=shape.device)
            for width in (shape.key, shape.value)
        )
        return cls(keys, values, decode)

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [heads, N, width]; slots [N * heads]: where they go, see `slot_mapping`."""
        slots = slots.to(self.keys.device)
        for cache, new in ((self.keys, key), (self.values, value)):
            cache.view(-1, cache.shape[-1]).index_copy_(0, slots, new.transpose(0, 1).reshape(-1, cache.shape[-1]))

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, blocks * block size, width] of the blocks [n] of one sequence. Copies."""
        blocks = blocks.to(self.keys.device)
        # Whole blocks first: PyTorch would copy all of a pool that is not contiguous before it selects.
        keys, values = (cache.index_select(0, blocks).transpose(0, 1) for cache in (self.keys, self.values))
        return keys.flatten(1, 2), values.flatten(1, 2)

    def copy(self, copy: BlockCopy) -> None:
        if copy.source != copy.target:
            for cache in (self.keys, self.values):
                cache[copy.target, :, : copy.num_tokens] = cache[copy.source, :, : copy.num_tokens]


def slot_mapping(blocks: Tensor, offsets: Tensor, heads: int, block_size: int) -> Tensor:
    """Where tokens lie in a pool with so many heads, [N * heads]: lines of its keys, seen as [lines, width]. blocks,
    offsets [N]: the block of each token, and its place in there."""
    head = torch.arange(heads, device=blocks.device)
    return ((blocks * heads * block_size + offsets)[:, None] + head * block_size).reshape(-1)
