"""Where keys and values lie, in blocks of tokens. No tensors here."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCopy:
    """Copy the keys and values of the first `num_tokens` tokens of one block to another."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class ChunkLayout:
    """The tokens start..end of a sequence, computed in one pass, and the blocks of its keys and values."""

    block_table: Sequence[int] | None  # None: nothing is kept, the sequence is read whole in this pass
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start
