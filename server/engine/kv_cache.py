"""Whose keys and values lie where, and which of them another text can use. Bookkeeping only: no tensors here.

A tape has one extent for all its tokens, side by side, because attention reads them in place: gathering scattered
blocks would copy every key and value in every step. What a tape leaves behind stays until the space is needed. A text
that begins like it gets a copy of the common part, which costs far less than to compute it (docs/engine.md).

What makes two beginnings the same is each token and what steered it: the columns themselves and their multipliers,
never a name. Tokens that nothing steers are the same under any steering, up to the first one that differs.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from server.attention.places import Extent, Move
from server.engine.extents import Extents
from server.engine.tape import Tape, acts
from steering.types import RowSteering

MARK = 32  # bits of a token's id below the mark of what steers it
KEPT_MARKS = 4096
KEPT_TEXTS = 128  # a lookup compares with each of them


@dataclass(frozen=True)
class Left:
    """What an ended tape computed."""

    content: NDArray[np.int64]
    steered: list[int]


class KVCache:
    """Hands out extents to tapes. `moves` are to be made, in order, before the next forward pass."""

    def __init__(self, largest: int, roots: int) -> None:
        """Room for `roots` texts of `largest` tokens each, or more that are shorter."""
        self.extents = Extents(largest, roots)
        self.shared_tokens = 0  # copied instead of computed, since the start
        self.moves: list[Move] = []
        self._open: dict[Tape, None] = {}  # in the order of opening
        self._left: OrderedDict[Extent, Left] = OrderedDict()  # by ended tapes, oldest use first
        self._marks: dict[RowSteering, int] = {}
        self._next_mark = 1

    def places(self, tokens: int) -> int:
        """How many texts of so many tokens an empty cache has room for."""
        size = self.extents.size_for(tokens)
        return self.extents.total // size if size else 0

    def open(self, tape: Tape, room: int) -> bool:
        """Gives the tape an extent for `room` tokens and what is known of its beginning; False: there is no space."""
        tape.content = self._content(tape)
        source, count, steered = self._best(tape)
        extent = self._take_low(room, source)
        if extent is None:
            return False
        tape.extent, tape.cached, tape.steered = extent, count, steered[:count]
        self._open[tape] = None
        if source is not None:
            self.moves.append(Move(source, extent, count))
            self.shared_tokens += count
        return True

    def grow(self, tape: Tape, room: int) -> bool:
        """Makes the tape's extent hold `room` tokens, elsewhere if need be; False: there is no space, nothing
        changed."""
        old = tape.extent
        assert old is not None, "only an open tape can grow"
        if old.size >= room:
            return True
        # Free first: the larger piece may be made of the old one and its twin.
        self.extents.give(old)
        new = self._take(room)
        if new is None:
            again = self.extents.take(old.size)
            assert again is not None, "a piece that was just free is free"
            # The lowest free piece of this size may be another one.
            new = again
        if new != old and tape.cached:
            self.moves.append(Move(old, new, tape.cached))
        tape.extent = new
        return new.size >= room

    def close(self, tape: Tape, *, keep: bool = True) -> None:
        """Takes the extent back; with `keep` its content serves others until the space is needed, otherwise it is
        wiped: what is not a number would spoil a row that only skips over it."""
        extent, count, steered = tape.extent, tape.cached, tape.steered
        assert extent is not None, "only an open tape can be closed"
        del self._open[tape]
        tape.extent, tape.cached = None, 0
        if not keep:
            self.moves.append(Move(None, extent, extent.size))
        if not keep or not count:
            self.extents.give(extent)
            return
        content = self._content(tape)[:count]
        for other, left in list(self._left.items()):
            if len(left.content) <= count and _common(left.content, content) == len(left.content):
                self._drop(other)
        self._left[extent] = Left(content, steered)
        if len(self._left) > KEPT_TEXTS:
            self._drop(next(iter(self._left)))

    def forget(self) -> None:
        """Drops what ended tapes left behind."""
        for extent in list(self._left):
            self._drop(extent)

    def wipe(self) -> None:
        """The same, and makes all that is free zero: something there may be no number."""
        self.forget()
        self.moves += [Move(None, extent, extent.size) for extent in self.extents.free]

    def shareable(self, tape: Tape) -> int:
        """How many tokens at the beginning are known already."""
        tape.content = self._content(tape)
        return self._best(tape)[1]

    def coming(self, tape: Tape, others: Iterable[Tape]) -> int:
        """How many tokens at the beginning are known once `others` have computed theirs."""
        tape.content = self._content(tape)
        return max((self._usable(other.content, tape) for other in others), default=0)

    def check(self) -> None:
        """Raises AssertionError when an invariant is broken: pieces overlap, get lost or are too small."""
        held = [tape.extent for tape in self._open if tape.extent] + list(self._left)
        assert len(held) == len(self._open) + len(self._left), "an open tape has no extent"
        spans = sorted((extent.start, extent.start + extent.size) for extent in held)
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "two extents overlap"
        assert sum(extent.size for extent in held) + self.extents.free_tokens == self.extents.total, "memory is lost"
        assert all(tape.extent and tape.cached <= tape.extent.size for tape in self._open), "a tape has outgrown"
        assert all(len(tape.steered) == tape.cached for tape in self._open), "a token has no count"
        for extent, left in self._left.items():
            assert len(left.content) == len(left.steered) <= extent.size, "more is kept than fits"

    def _take(self, room: int) -> Extent | None:
        """A free piece for `room` tokens; what ended tapes left goes first, the longest unused before."""
        size = self.extents.size_for(room)
        if size is None:
            return None
        while (extent := self.extents.take(size)) is None:
            if not self._left:
                return None
            self._drop(next(iter(self._left)))
        return extent

    def _take_low(self, room: int, source: Extent | None) -> Extent | None:
        """The same at the lowest place that no running row has, so that rows come to lie side by side. What an ended
        tape left there is moved to the top. `source` stays where it is: it is going to be read."""
        size = self.extents.size_for(room)
        extent = None if size is None else self.extents.take(size)
        below = extent.start if extent else self.extents.total
        lower = [left for left in self._left if left.size == size and left.start < below and left != source]
        if not lower:
            return extent or self._take(room)
        if extent is not None:
            self.extents.give(extent)
        extent = min(lower, key=lambda one: one.start)
        left = self._left.pop(extent)
        size = self.extents.size_for(len(left.content))
        assert size is not None, "what was held can be held"
        top = self.extents.take(size, top=True)
        if top is not None:
            self._left[top] = left
            self.moves.append(Move(extent, top, len(left.content)))
        return extent

    def _drop(self, extent: Extent) -> None:
        del self._left[extent]
        self.extents.give(extent)

    def _best(self, tape: Tape) -> tuple[Extent | None, int, list[int]]:
        """Where the longest known beginning of the tape lies, how long it is, and how often its tokens were steered."""
        best: Extent | None = None
        longest, steered = 0, []
        known = [(one.extent, one.content[: one.cached], one.steered) for one in self._open]
        known += [(extent, left.content, left.steered) for extent, left in self._left.items()]
        for extent, content, counts in known:
            count = self._usable(content, tape)
            if count > longest:
                best, longest, steered = extent, count, counts
        if best is not None and best in self._left:
            self._left.move_to_end(best)
        return best, longest, steered

    @staticmethod
    def _usable(content: NDArray[np.int64], tape: Tape) -> int:
        return min(_common(content, tape.content), tape.shareable)

    def _content(self, tape: Tape) -> NDArray[np.int64]:
        """Each token together with the mark of what steers it."""
        content = np.array(tape.tokens, dtype=np.int64)
        if tape.steer.columns.slots:
            acting = acts(tape.steer.positions, 0, len(content), tape.prompt)
            content[acting] |= self._mark(tape.steer.columns) << MARK
        return content

    def _mark(self, steering: RowSteering) -> int:
        """A number for equal steerings, never given twice. A removed checkpoint's columns equal no others."""
        if steering not in self._marks:
            if len(self._marks) >= KEPT_MARKS:
                self._marks.clear()
            self._marks[steering] = self._next_mark
            self._next_mark += 1
        return self._marks[steering]


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How long the common beginning is."""
    length = min(len(one), len(other))
    if not length or one[0] != other[0]:
        return 0
    differ = one[:length] != other[:length]
    first = int(differ.argmax())
    return first if differ[first] else length
