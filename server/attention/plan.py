"""Where the tokens of one forward pass belong, and how one layer attends to them.

Single tokens of rows go to `DecodeAttention` where there is one. Without it, one call of PyTorch's attention serves
rows whose extents lie side by side; a mask keeps each row to its own length. Every row of a call is read as far as the
longest one, so a row that is much longer or shorter than its neighbours gets a call of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from server.attention.decode_attention import DecodeAttention
from server.attention.places import Chunk, Extent
from server.attention.store import Store, lines
from server.attention.torch_attention import Rules, attention, hidden_keys
from steering.row_table import upload


@dataclass(frozen=True)
class Piece:
    """Tokens lo..hi of the line that are attended to in one call: one token each of rows whose extents are neighbours,
    or a chunk of one text. `lengths`: how many tokens each row has, new ones included."""

    lo: int
    hi: int
    rows: int
    extent: Extent | None  # None: the text has nothing in the cache
    lengths: tuple[int, ...]

    @property
    def count(self) -> int:
        """New tokens of each row."""
        return (self.hi - self.lo) // self.rows

    def waste(self, length: int) -> int:
        """How many keys more are read when a row of this length joins than when it is attended to by itself."""
        longest = max(self.lengths)
        return (self.rows + 1) * max(longest, length) - self.rows * longest - length

    def span(self, window: int | None) -> tuple[int, int]:
        """The keys that some new token can see."""
        first = min(self.lengths) - self.count + 1
        return (max(0, first - window) if window else 0), max(self.lengths)


@dataclass
class Plan:
    """Indices and masks are made once and serve every layer."""

    chunks: Sequence[Chunk]
    pieces: list[Piece]
    places: Tensor  # [N] int64: each token's index in its row
    decode: DecodeAttention | None = None
    singles: Tensor | None = None  # [R, 4]: tokens of rows that `decode` attends to; the others are in `pieces`
    _lines: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None, int, torch.dtype, torch.device], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls, chunks: Sequence[Chunk], device: torch.device, call: int = 0, decode: DecodeAttention | None = None
    ) -> "Plan":
        """Chunks in the order of their tokens in the line. `call`: reading so many keys takes as long as one call of
        attention more. `decode`: attends to single tokens."""
        places: list[int] = []
        singles, lo = [], 0
        pieces: list[Piece] = []
        for chunk in chunks:
            extent, stop, hi = chunk.extent, chunk.stop, lo + len(chunk)
            places += range(chunk.start, stop)
            last = pieces[-1] if pieces else None
            if decode and extent and len(chunk) == 1:
                singles.append((lo, extent.start, extent.size, stop))
            elif len(chunk) == 1 and last and _continues(last, extent) and last.waste(stop) <= call:
                pieces[-1] = Piece(last.lo, hi, last.rows + 1, last.extent, (*last.lengths, stop))
            else:
                pieces.append(Piece(lo, hi, 1, extent, (stop,)))
            lo = hi
        line = upload(np.array(places, dtype=np.int64), device)
        return cls(chunks, pieces, line, decode, torch.tensor(singles) if singles else None)

    def attend(self, store: Store | None, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """query [N, heads, width], key and value [1, key heads, N, width] -> [N, heads, value width]. Writes keys and
        values into the store; without one, those given are all there are."""
        tokens, heads, width = query.shape
        groups = heads // key.shape[1]
        out = query.new_empty(tokens, heads, value.shape[-1])
        if store and self.pieces:
            store.write(self._written(key.shape[1]), key[0], value[0])
        if store and self.decode and self.singles is not None:
            self.decode(self.singles, query, key, value, store, out, rules)
        for index, piece in enumerate(self.pieces):
            lo, hi, start, stop = piece.lo, piece.hi, *piece.span(rules.window)
            if store is None or piece.extent is None:
                keys, values = key[:, :, lo + start : lo + stop], value[:, :, lo + start : lo + stop]
            else:
                keys, values = store.read(piece.extent, piece.rows, start, stop)
            mask = self._mask(index, rules.window, groups, query)
            # [rows, key heads, groups * count, width]: queries that share their keys stand together
            asked = query[lo:hi].view(piece.rows, piece.count, -1, groups, width).permute(0, 2, 3, 1, 4)
            found = attention(asked.reshape(piece.rows, -1, groups * piece.count, width), keys, values, mask, rules)
            found = found.view(piece.rows, -1, groups, piece.count, value.shape[-1]).permute(0, 3, 1, 2, 4)
            out[lo:hi] = found.reshape(hi - lo, heads, -1)
        return out

    def _written(self, heads: int) -> Tensor:
        """[N * heads]: where the tokens' keys and values go in a store with so many heads."""
        if heads not in self._lines:
            rows = [(own.start, own.size, len(chunk)) for chunk in self.chunks if (own := chunk.extent)]
            assert len(rows) == len(self.chunks), "only texts with a place are kept"
            table = upload(np.array(rows, dtype=np.int64), self.places.device)
            starts, sizes = table[:, :2].repeat_interleave(table[:, 2], dim=0, output_size=len(self.places)).T
            self._lines[heads] = lines(starts, sizes, self.places, heads)
        return self._lines[heads]

    def _mask(self, index: int, window: int | None, groups: int, like: Tensor) -> Tensor | None:
        """What to add to the scores of a piece: [rows or 1, 1, groups * new tokens, keys]; None: nothing."""
        key = index, window, groups, like.dtype, like.device
        if key not in self._masks:
            self._masks[key] = _mask(self.pieces[index], window, groups, like.dtype, like.device)
        return self._masks[key]


def _mask(piece: Piece, window: int | None, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if piece.count == 1 and len(set(piece.lengths)) == 1:
        return None  # each sees all that there is
    start, stop = piece.span(window)
    lengths = upload(np.array(piece.lengths), device)[:, None]
    # [rows, new tokens]: the last key that each may see
    last = lengths - piece.count + torch.arange(piece.count, device=device)
    hidden = hidden_keys(torch.arange(start, stop, device=device), last, window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    return mask[:, None].repeat(1, 1, groups, 1)


def _continues(piece: Piece, extent: Extent | None) -> bool:
    """Whether a row's extent is the next one after those of a piece of single tokens."""
    own = piece.extent
    return (
        extent is not None
        and own is not None
        and piece.count == 1
        and extent.size == own.size
        and extent.start == own.start + piece.rows * own.size
    )
