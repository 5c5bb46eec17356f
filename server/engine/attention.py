"""Attention over our own keys and values, inside the Hugging Face model's own code.

A forward pass is one line of packed tokens, [1, N]: no padding, each token with its position. `AttentionInterface` is
transformers' extension point; layers call `attend` with the new queries, keys and values, and everything else (grouped
heads, windows, caps, sinks, scales) comes with the call. Where the extents of several rows lie side by side, one call
of PyTorch's attention serves them all; a mask keeps each row to its own length.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from server.engine.kv_cache import Move
from server.engine.tape import Extent, Work

NAME = "matsteer"


@dataclass(frozen=True)
class Shape:
    """One layer's keys and values of one token."""

    heads: int
    key: int  # width of a head
    value: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.heads * (self.key + self.value) * self.dtype.itemsize


@dataclass(frozen=True)
class Store:
    """One layer's keys [tokens * heads, width] and values: an extent has one head after the other."""

    shape: Shape
    keys: Tensor
    values: Tensor

    def write(self, where: Tensor, key: Tensor, value: Tensor) -> None:
        """key, value [heads, N, width]; where [N * heads]: the lines they go to."""
        self.keys.index_copy_(0, where, key.transpose(0, 1).reshape(-1, self.shape.key))
        self.values.index_copy_(0, where, value.transpose(0, 1).reshape(-1, self.shape.value))

    def read(self, extent: Extent, rows: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, stop - start, width] of the tokens start..stop of an extent and its right-hand
        neighbours of the same size. Views."""
        heads = self.shape.heads
        return (
            _view(self.keys, extent, heads, rows, start, stop),
            _view(self.values, extent, heads, rows, start, stop),
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

    def span(self, window: int | None) -> tuple[int, int]:
        """The keys that some new token can see."""
        first = min(self.lengths) - self.count + 1
        return (max(0, first - window) if window else 0), max(self.lengths)


@dataclass
class Plan:
    """Where each token of one forward pass belongs. Masks and indices are made once and serve every layer."""

    pieces: list[Piece]
    starts: Tensor  # [N] int64: of the extent of each token's row
    sizes: Tensor  # [N]
    places: Tensor  # [N]: the token's index in its row
    _lines: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None, int, torch.dtype], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, works: Sequence[Work], device: torch.device) -> "Plan":
        """Works in the scheduler's order; without extents for texts that are read at one go."""
        spans, lo = [], 0
        pieces: list[Piece] = []
        for work in works:
            extent, hi = work.tape.extent, lo + len(work)
            last = pieces[-1] if pieces else None
            if len(work) == 1 and last and _continues(last, extent):
                pieces[-1] = Piece(last.lo, hi, last.rows + 1, last.extent, (*last.lengths, work.stop))
            else:
                pieces.append(Piece(lo, hi, 1, extent, (work.stop,)))
            start, size = (extent.start, extent.size) if extent else (0, 0)
            spans.append((start, size, work.start, len(work)))
            lo = hi
        table = np.array(spans, dtype=np.int64)
        counts = table[:, 3]
        firsts = np.repeat(table[:, 2] - (np.cumsum(counts) - counts), counts)
        columns = np.stack([*np.repeat(table[:, :2], counts, axis=0).T, firsts + np.arange(lo)])
        starts, sizes, places = torch.from_numpy(columns).to(device).unbind()
        return cls(pieces, starts, sizes, places)

    def lines(self, heads: int) -> Tensor:
        """[N * heads]: where the tokens' keys and values go in a store with so many heads."""
        if heads not in self._lines:
            head = torch.arange(heads, device=self.starts.device)
            lines = (self.starts * heads + self.places)[:, None] + head * self.sizes[:, None]
            self._lines[heads] = lines.reshape(-1)
        return self._lines[heads]

    def mask(self, index: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor | None:
        """What to add to the scores of a piece: [rows or 1, 1, groups * new tokens, keys]; None: nothing."""
        key = index, window, groups, dtype
        if key not in self._masks:
            self._masks[key] = _mask(self.pieces[index], window, groups, dtype, self.starts.device)
        return self._masks[key]


class Attention:
    """Keys and values of all layers, and the attention of the model that `using` is about."""

    def __init__(self, device: torch.device) -> None:
        self.shapes: dict[int, Shape] = {}  # of each layer, as the first pass showed them
        self.windowed: set[int] = set()  # layers that look back a limited way
        self._device = device
        self._stores: dict[int, Store] = {}
        self._plan: Plan | None = None

    @property
    def token_bytes(self) -> int:
        """Memory that one token's keys and values take in all layers together."""
        return sum(shape.bytes for shape in self.shapes.values())

    def allocate(self, tokens: int) -> None:
        """Makes room for so many tokens in every layer that a pass has shown."""
        for layer, shape in self.shapes.items():
            lines = tokens * shape.heads
            keys = torch.zeros(lines, shape.key, dtype=shape.dtype, device=self._device)
            values = torch.zeros(lines, shape.value, dtype=shape.dtype, device=self._device)
            self._stores[layer] = Store(shape, keys, values)

    def move(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for store in self._stores.values():
                store.move(move)

    @contextmanager
    def using(self, works: Sequence[Work]) -> Iterator[None]:
        """The model's forward passes inside are about these works."""
        self._plan = Plan.of(works, self._device)
        _here.attention = self
        try:
            yield
        finally:
            _here.attention = self._plan = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        cap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [1, heads, N, width], key and value [1, key heads, N, width] -> [1, N, heads, value width]."""
        plan = self._plan
        assert plan is not None, "a pass belongs to works"
        heads, tokens, _ = query.shape[1:]
        groups = heads // key.shape[1]
        store = self._stores.get(layer)
        if store is None:
            self.shapes[layer] = Shape(key.shape[1], key.shape[-1], value.shape[-1], key.dtype)
            if window:
                self.windowed.add(layer)
        else:
            store.write(plan.lines(key.shape[1]), key[0], value[0])
        lines = query[0].transpose(0, 1)  # [N, heads, width]
        out = query.new_empty(tokens, heads, value.shape[-1])
        for index, piece in enumerate(plan.pieces):
            lo, hi, start, stop = piece.lo, piece.hi, *piece.span(window)
            if store is None or piece.extent is None:
                keys, values = key[:, :, lo + start : lo + stop], value[:, :, lo + start : lo + stop]
            else:
                keys, values = store.read(piece.extent, piece.rows, start, stop)
            mask = plan.mask(index, window, groups, query.dtype)
            # [rows, key heads, groups * count, width]: queries that share their keys stand together
            asked = lines[lo:hi].view(piece.rows, piece.count, -1, groups, query.shape[-1]).permute(0, 2, 3, 1, 4)
            asked = asked.reshape(piece.rows, -1, groups * piece.count, query.shape[-1])
            if cap is None and sinks is None:
                found = scaled_dot_product_attention(asked, keys, values, attn_mask=mask, scale=scale)
            else:
                found = _plain_attention(asked, keys, values, mask, scale, cap, sinks)
            found = found.view(piece.rows, -1, groups, piece.count, value.shape[-1]).permute(0, 3, 1, 2, 4)
            out[lo:hi] = found.reshape(hi - lo, heads, -1)
        return out[None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls. The mask is ours to make: it knows nothing of packed texts."""
    attention = getattr(_here, "attention", None)
    if attention is None:
        raise RuntimeError("this model's attention is the engine's: run it through the engine")
    layer: Any = module.layer_idx
    found = attention.attend(
        layer,
        query,
        key,
        value,
        scale=options.get("scaling"),
        window=options.get("sliding_window"),
        cap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    return found, None


def _plain_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float | None,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention step by step, for what PyTorch's has no argument for: capped scores (Gemma 2) and sinks (GPT-OSS)."""
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        rows, heads, asked, _ = scores.shape
        sink = sinks.view(1, heads, -1, 1).expand(rows, heads, -1, asked * heads // len(sinks))
        scores = torch.cat([scores, sink.reshape(rows, heads, asked, 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values


def _mask(piece: Piece, window: int | None, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if piece.count == 1 and len(set(piece.lengths)) == 1:
        return None  # each sees all that there is
    start, stop = piece.span(window)
    lengths = torch.tensor(piece.lengths, device=device)[:, None]
    # [rows, new tokens]: the last key that each may see
    last = lengths - piece.count + torch.arange(piece.count, device=device)
    keys = torch.arange(start, stop, device=device)
    hidden = keys > last[..., None]
    if window:
        hidden |= keys <= last[..., None] - window
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


def _view(lines: Tensor, extent: Extent, heads: int, rows: int, start: int, stop: int) -> Tensor:
    width = lines.shape[1]
    return lines.as_strided(
        (rows, heads, stop - start, width),
        (extent.size * heads * width, extent.size * width, width, 1),
        (extent.start * heads + start) * width,
    )


_here = threading.local()
AttentionInterface.register(NAME, _attend)
