"""A device-side cache of what rows ask for: one line of multipliers for each distinct SequenceSteering in use."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.errors import ColumnError
from steering.types import Handle, SequenceSteering, Site

NO_OWNER = -1  # the owner of a token that no column acts on


class RowTable:
    """Lines [capacity, columns] of multipliers, and for each line the first site that acts on its tokens.

    Line 0 stays zero: it is what an unsteered token reads. A row is written when it is first placed and stays until
    its line is needed or one of its handles is forgotten, so that a step whose rows were seen before copies nothing.
    """

    def __init__(self, device: torch.device, starts: Mapping[Site, int], columns: int, capacity: int = 257) -> None:
        self.values = torch.zeros(capacity, columns, device=device)
        self.owners = torch.full((capacity,), NO_OWNER, dtype=torch.int32, device=device)
        self._starts = dict(starts)  # where a site's columns begin; also the number by which the site is an owner
        self._lines: dict[SequenceSteering, int] = {}
        self._free = list(range(capacity - 1, 0, -1))

    def place(self, rows: Sequence[SequenceSteering], live: set[Handle]) -> NDArray[np.int64]:
        """The line of each row. Raises ColumnError, changing nothing, for a row with a handle that is not `live`."""
        new = [row for row in dict.fromkeys(rows) if row.slots and row not in self._lines]
        for row in new:
            if not live.issuperset(row.handles):
                raise ColumnError("a row is steered by a handle that was removed or belongs to another bank")
        if len(new) > len(self._free):
            self._evict_all_but(rows)
        if len(new) > len(self._free):
            self._grow(len(new))
        if new:
            self._write(new)
        return np.fromiter((self._lines.get(row, 0) for row in rows), dtype=np.int64, count=len(rows))

    def forget(self, handle: Handle) -> None:
        """Frees every line that uses `handle`, whose slots may next belong to other columns."""
        self._evict([row for row in self._lines if handle in row.handles])

    def check(self, live: set[Handle]) -> None:
        """Raises AssertionError when an invariant is broken."""
        used = list(self._lines.values())
        assert sorted([0, *used, *self._free]) == list(range(len(self.values))), "a line is neither free nor used once"
        assert not self.values[0].any(), "line 0 steers"
        assert self.owners[0] == NO_OWNER, "line 0 is counted"
        for row, line in self._lines.items():
            assert live.issuperset(row.handles), "a line belongs to a removed handle"
            values, owner = self._describe(row)
            assert self.values[line].cpu().numpy().tolist() == values.tolist(), "a line differs from its row"
            assert int(self.owners[line]) == owner, "a line has the wrong owner"

    def _describe(self, row: SequenceSteering) -> tuple[NDArray[np.float32], int]:
        values = np.zeros(self.values.shape[1], dtype=np.float32)
        for site, index, value in row.slots:
            values[self._starts[site] + index] = value
        return values, self._starts[row.slots[0][0]]

    def _write(self, new: list[SequenceSteering]) -> None:
        described = [self._describe(row) for row in new]
        lines = [self._free.pop() for _ in new]
        where = upload(np.array(lines, dtype=np.int64), self.values.device)
        self.values.index_copy_(0, where, upload(np.stack([values for values, _ in described]), self.values.device))
        owners = np.array([owner for _, owner in described], dtype=np.int32)
        self.owners.index_copy_(0, where, upload(owners, self.values.device))
        self._lines.update(zip(new, lines, strict=True))

    def _evict_all_but(self, rows: Sequence[SequenceSteering]) -> None:
        kept = set(rows)
        self._evict([row for row in self._lines if row not in kept])

    def _evict(self, rows: list[SequenceSteering]) -> None:
        self._free.extend(self._lines.pop(row) for row in rows)

    def _grow(self, needed: int) -> None:
        old, more = len(self.values), max(needed, len(self.values))
        self.values = torch.cat([self.values, self.values.new_zeros(more, self.values.shape[1])])
        self.owners = torch.cat([self.owners, self.owners.new_full((more,), NO_OWNER)])
        self._free.extend(range(old + more - 1, old - 1, -1))


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A device copy of a small host array that does not wait for the device's queue.

    A copy from pageable memory would make the host wait for the step that is running; pinned blocks come from
    PyTorch's cache, which keeps them until the copy has been made.
    """
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
