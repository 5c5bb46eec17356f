"""One layer's keys and values, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from server.attention.places import Extent, Move


@dataclass(frozen=True)
class Shape:
    """One layer's keys and values of one token."""

    heads: int
    key: int  # width of a head
    value: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.heads * (self.key + self.value) * self.dtype.itemsize


def lines(starts: Tensor, sizes: Tensor, places: Tensor, heads: int) -> Tensor:
    """Where tokens lie in a store with so many heads, [N * heads]. starts, sizes: of the extents of their rows [N];
    places: in their rows [N]."""
    head = torch.arange(heads, device=places.device)
    return ((starts * heads + places)[:, None] + head * sizes[:, None]).reshape(-1)


@dataclass(frozen=True)
class Store:
    """Keys [tokens * heads, width] and values: an extent has one head after the other."""

    shape: Shape
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, shape: Shape, tokens: int) -> "Store":
        lines = tokens * shape.heads
        # Zeros: what is not a number would spoil a row that only skips over it.
        keys = torch.zeros(lines, shape.key, dtype=shape.dtype, device=shape.device)
        return cls(shape, keys, torch.zeros(lines, shape.value, dtype=shape.dtype, device=shape.device))

    def write(self, where: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [heads, N, width]; where [N * heads]: the lines they go to."""
        where = where.to(self.keys.device)
        self.keys.index_copy_(0, where, key.transpose(0, 1).reshape(-1, self.shape.key))
        self.values.index_copy_(0, where, value.transpose(0, 1).reshape(-1, self.shape.value))

    def read(self, extent: Extent, rows: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, stop - start, width] of the tokens start..stop of an extent and its right-hand
        neighbours of the same size. Views."""
        return self._view(self.keys, extent, rows, start, stop), self._view(self.values, extent, rows, start, stop)

    def gather(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """where [rows, heads, tokens]: lines -> keys and values [rows, heads, tokens, width]. Copies."""
        flat = where.reshape(-1)
        return (
            self.keys.index_select(0, flat).view(*where.shape, self.shape.key),
            self.values.index_select(0, flat).view(*where.shape, self.shape.value),
        )

    def move(self, move: Move) -> None:
        """The two extents may overlap."""
        targets = self.read(move.target, 1, 0, move.count)
        if move.source is None:
            for target in targets:
                target.zero_()
            return
        sources = [part.clone() for part in self.read(move.source, 1, 0, move.count)]
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def _view(self, lines: Tensor, extent: Extent, rows: int, start: int, stop: int) -> Tensor:
        heads, width = self.shape.heads, lines.shape[1]
        return lines.as_strided(
            (rows, heads, stop - start, width),
            (extent.size * heads * width, extent.size * width, width, 1),
            (extent.start * heads + start) * width,
        )
