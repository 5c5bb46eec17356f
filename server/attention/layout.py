"""Where keys and values lie, in blocks of tokens. No tensors here."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCopy:
    """Copy the keys and values of one block to another."""

    source: int
    target: int


def independent_copies(copies: Iterable[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """Copies that are to be made in order, in parts whose copies may be made at once: mostly one. None of a part writes
    to what another one of it reads or writes to."""
    part: list[BlockCopy] = []
    read, written = set[int](), set[int]()
    for copy in copies:
        if copy.source == copy.target:
            continue
        if copy.source in written or copy.target in written or copy.target in read:
            yield part
            part, read, written = [], set(), set()
        part.append(copy)
        read.add(copy.source)
        written.add(copy.target)
    if part:
        yield part


@dataclass(frozen=True)
class ChunkLayout:
    """The tokens start..end of a sequence, computed in one pass, and the blocks of its keys and values."""

    block_table: Sequence[int] | None  # None: nothing is kept, the sequence is read whole in this pass
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start
