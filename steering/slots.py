"""Device buffers in slots, of which each holds what belongs to one column."""

from typing import ClassVar

import torch
from torch import Tensor

from steering.column import Column


class Slots:
    """Slots for columns: free ones are zero in every buffer. A buffer changes its address in `_grow` only."""

    BUFFERS: ClassVar[tuple[str, ...]]  # the attributes that have a line for each slot: [slots, ...]

    def __init__(self) -> None:
        self.columns: list[Column | None] = []

    @property
    def live(self) -> int:
        return sum(column is not None for column in self.columns)

    @property
    def free(self) -> int:
        return len(self.columns) - self.live

    def drop(self, index: int) -> None:
        """Clears a slot and makes it free."""
        self.columns[index] = None
        for name in self.BUFFERS:
            getattr(self, name)[index].zero_()

    def _grow(self, capacity: int) -> None:
        """Adds free slots up to `capacity`; columns keep theirs."""
        more = capacity - len(self.columns)
        self.columns.extend([None] * more)
        for name in self.BUFFERS:
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(more, *old.shape[1:])]))

    def _take(self, column: Column) -> int:
        """A free slot, which is the column's from now on."""
        index = self.columns.index(None)
        self.columns[index] = column
        return index
