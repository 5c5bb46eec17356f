"""Where keys and values lie. No tensors here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """A piece of the memory for keys and values, in tokens."""

    start: int
    size: int


@dataclass(frozen=True)
class Move:
    """Copy the keys and values of the first `count` tokens of one extent to another, which may overlap; without a
    source make them zero."""

    source: Extent | None
    target: Extent
    count: int


@dataclass(frozen=True)
class Chunk:
    """The tokens start..stop of a text, computed in one pass, and where the text's keys and values lie."""

    extent: Extent | None  # None: nowhere, the text is read at one go
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start
