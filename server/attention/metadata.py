"""Where the tokens of one forward pass belong, and how one layer attends to them.

Single tokens of sequences (decode) are attended to in one call over all their blocks, `paged_attention_decode`. Chunks
of prompts go to FlashAttention, `varlen_attention`, after their keys and values have been gathered, whole blocks at a
time: all in one call, or in several that gather a bounded number of bytes each. What it does not know goes to one call
that reads blocks where they lie, `paged_attention_prefill`. Without kernels each chunk goes to PyTorch's attention with
a mask, in pieces whose scores take so many bytes.

Where a layer leaves rotary embeddings to its attention, that of single tokens turns what it reads; for chunks, which
need theirs turned beforehand, the line is turned after that. (In static shapes with chunks it is turned first, by the
same arithmetic: `MixedMetadata`.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.attention.kv_pool import SCRATCH_BYTES, KVPool
from server.attention.layout import ChunkLayout
from steer_ops import rotary
from steering.bank import upload

SCORE_BYTES = 16  # of a token, a key and a head, at most: while scores become weights, and in the mask


@dataclass(frozen=True)
class AttentionParams:
    """What a layer asks of its attention."""

    scale: float | None = None  # None: one over the root of the width
    window: int | None = None  # how many tokens a token sees, itself included
    softcap: float | None = None  # scores go through softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # [heads]: attention sinks (GPT-OSS), in the softmax's denominator without a value
    # Cosines and sines, [N, turned] each, that queries and keys are still to be turned by (`steer_ops.rotary`).
    rotary: tuple[Tensor, Tensor] | None = None

    @property
    def rules(self) -> dict[str, Any]:
        """What FlashAttention does not know."""
        rules = {"softcap": self.softcap, "sinks": self.sinks}
        return {name: rule for name, rule in rules.items() if rule is not None}

    def scale_of(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def of(self, rows: slice | Tensor) -> "AttentionParams":
        """For some tokens of the line."""
        return self if self.rotary is None else replace(self, rotary=(self.rotary[0][rows], self.rotary[1][rows]))


@dataclass(frozen=True)
class Decodes:
    """Single tokens that are attended to in one call."""

    rows: slice | Tensor  # which tokens of the line
    block_tables: Tensor  # [R, blocks] int32; beyond a row's own anything
    context_lens: Tensor  # [R] int32: tokens of each row, the new one included


@dataclass(frozen=True)
class Prefill:
    """Tokens lo..hi of the line: a chunk of one sequence, which has so many tokens in all."""

    lo: int
    hi: int
    context_len: int
    block_table: Sequence[int] | None  # the blocks of its keys; None: nothing is kept

    @property
    def count(self) -> int:
        return self.hi - self.lo

    @property
    def is_whole(self) -> bool:
        """Whether it brings all the keys that there are."""
        return self.count == self.context_len

    def first_key(self, window: int | None) -> int:
        """The first key that some of the new tokens see."""
        return max(0, self.context_len - self.count + 1 - window) if window else 0

    def blocks(self, window: int | None, block_size: int) -> Sequence[int]:
        """Those with the keys that the new tokens see."""
        return (self.block_table or ())[self.first_key(window) // block_size : -(-self.context_len // block_size)]

    def pieces(self, window: int | None, scores: int) -> Iterator["Prefill"]:
        """Itself in parts, in order: with at most `scores` pairs of a new token and a key each, or of one token."""
        most = max(1, scores // (self.context_len - self.first_key(window)))
        if window:  # so many tokens see as many keys, and a window
            most = max(most, (math.isqrt(window**2 + 4 * scores) - window) // 2)
        for lo in range(self.lo, self.hi, most):
            hi = min(lo + most, self.hi)
            yield replace(self, lo=lo, hi=hi, context_len=self.context_len - (self.hi - hi))


@dataclass(frozen=True)
class Varlen:
    """Chunks of a pass, as `steer_ops.varlen_attention` takes them."""

    rows: slice | Tensor  # which tokens of the line are theirs
    query_starts: Tensor  # [chunks + 1] int32, among those
    key_starts: Tensor  # [chunks + 1] int32
    key_lens: Tensor  # [chunks] int32
    most_queries: int
    most_keys: int
    blocks: Tensor | None  # [n] int64: those whose keys are gathered; None: keys are those of the line

    @classmethod
    def calls(
        cls, prefills: Sequence[Prefill], window: int | None, block_size: int, most_blocks: int, device: torch.device
    ) -> list["Varlen"]:
        """All chunks, in calls that gather at most so many blocks each, or those of one chunk."""
        if all(one.is_whole for one in prefills):
            return [cls._of(prefills, window, block_size, device)]
        calls: list[list[Prefill]] = []
        room = 0
        for prefill in prefills:
            blocks = len(prefill.blocks(window, block_size))
            if not calls or blocks > room:
                calls.append([])
                room = most_blocks
            calls[-1].append(prefill)
            room -= blocks
        return [cls._of(call, window, block_size, device) for call in calls]

    @classmethod
    def _of(cls, prefills: Sequence[Prefill], window: int | None, block_size: int, device: torch.device) -> "Varlen":
        counts, lens = [one.count for one in prefills], [one.context_len for one in prefills]
        starts, blocks = [one.lo for one in prefills], None
        if not all(one.is_whole for one in prefills):
            tables = [one.blocks(window, block_size) for one in prefills]
            lens = [
                length - one.first_key(window) // block_size * block_size
                for one, length in zip(prefills, lens, strict=True)
            ]
            starts = (np.cumsum([0, *map(len, tables)])[:-1] * block_size).tolist()
            blocks = upload(np.array([block for table in tables for block in table], dtype=np.int64), device)
        query_starts, key_starts, key_lens = (
            upload(np.array(numbers, dtype=np.int32), device)
            for numbers in (np.cumsum([0, *counts]), [*starts, 0], lens)
        )
        rows = _span([row for one in prefills for row in range(one.lo, one.hi)], device)
        return cls(rows, query_starts, key_starts, key_lens, max(counts), max(lens), blocks)


@dataclass(frozen=True)
class Paged:
    """Chunks of a pass, as `steer_ops.paged_attention_prefill` takes them."""

    rows: slice | Tensor  # which tokens of the line are theirs
    block_tables: Tensor  # [chunks, blocks] int32
    query_starts: Tensor  # [chunks + 1] int32, among those tokens
    context_lens: Tensor  # [chunks] int32

    @classmethod
    def of(cls, prefills: Sequence[Prefill], rows: slice | Tensor, device: torch.device) -> "Paged":
        tables = padded_tables([one.block_table or () for one in prefills])
        starts = np.cumsum([0, *(one.count for one in prefills)]).astype(np.int32)
        lens = np.array([one.context_len for one in prefills], dtype=np.int32)
        return cls(rows, upload(tables, device), upload(starts, device), upload(lens, device))


@dataclass
class AttentionMetadata:
    """Indices and masks are made once and serve every layer."""

    positions: Tensor  # [N] int64: each token's index in its sequence
    decodes: list[Decodes]
    prefills: list[Prefill]
    written: Tensor | None  # [tokens of `prefills`, 2] int64: block and offset of each
    prefill_rows: Tensor | slice  # which tokens of the line those are
    scratch_bytes: int = SCRATCH_BYTES  # of scores and masks at a time, and of keys and values that are gathered
    _blocks: dict[tuple[int, int | None, int], Tensor] = field(default_factory=dict)
    _paged: Paged | None = None
    _varlens: dict[tuple[int | None, int, int, torch.device], list[Varlen]] = field(default_factory=dict)
    _masks: dict[tuple[int, int, int | None, int, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        chunks: Sequence[ChunkLayout],
        device: torch.device,
        block_size: int,
        *,
        by_length: bool,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> "AttentionMetadata":
        """Chunks in the order of their tokens in the line. `by_length`: single tokens of many sequences are attended to
        in one call that reads each of them to its own length."""
        positions: list[int] = []
        singles: list[tuple[int, ChunkLayout]] = []
        prefills: list[Prefill] = []
        written: list[tuple[int, int]] = []
        rows: list[int] = []
        for chunk in chunks:
            lo = len(positions)
            positions += range(chunk.start, chunk.end)
            table = chunk.block_table
            if table is not None and len(chunk) == 1:
                singles.append((lo, chunk))
                continue
            if table is not None:
                written += [(table[at // block_size], at % block_size) for at in range(chunk.start, chunk.end)]
                rows += range(lo, lo + len(chunk))
            prefills.append(Prefill(lo, len(positions), chunk.end, table))
        groups = _groups(singles, block_size, by_length=by_length)
        return cls(
            positions=upload(np.array(positions, dtype=np.int64), device),
            decodes=[_decodes(group, block_size, device) for group in groups],
            prefills=prefills,
            written=upload(np.array(written, dtype=np.int64), device) if written else None,
            prefill_rows=_span(rows, device),
            scratch_bytes=scratch_bytes,
        )

    def attend(self, pool: KVPool | None, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """query [N, heads, width], key and value [1, key heads, N, width] -> [N, heads, value width]. Writes keys and
        values into the pool; without one, those given are all there are."""
        key, value = key[0], value[0]
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        if pool is not None:
            for decodes in self.decodes:
                self._decode(decodes, pool, query, key, value, out, params)
        if params.rotary is not None and self.prefills:
            query, turned = rotary(query, key.transpose(0, 1), *params.rotary)
            key, params = turned.transpose(0, 1), replace(params, rotary=None)
        if pool is not None and self.written is not None:
            pool.write(self.written, key[:, self.prefill_rows], value[:, self.prefill_rows])
            if pool.ops.varlen and self._is_kept and not params.rules:
                calls = self._varlen_calls(pool, params.window, query.device)
                for call in calls:
                    found = self._varlen(pool.ops.varlen, call, pool, query, key, value, params)
                    if len(calls) == 1 and not self.decodes:
                        return found
                    out[call.rows] = found
                return out
            if pool.ops.prefill and self._is_kept:
                self._paged_prefill(pool, query, out, params)
                return out
        for prefill in self.prefills:
            self._masked(prefill, pool, query, key, value, out, params)
        return out

    @property
    def _is_kept(self) -> bool:
        """Whether the keys of all chunks are in blocks."""
        return all(prefill.block_table is not None for prefill in self.prefills)

    @staticmethod
    def _decode(
        decodes: Decodes, pool: KVPool, query: Tensor, key: Tensor, value: Tensor, out: Tensor, params: AttentionParams
    ) -> None:
        rows, tables, lens = decodes.rows, decodes.block_tables, decodes.context_lens
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        if len(lens) == len(query):
            decode_attention(query, key, value, pool, tables, lens, out, params)
        elif isinstance(rows, slice):
            decode_attention(query[rows], key[rows], value[rows], pool, tables, lens, out[rows], params.of(rows))
        else:
            found = out.new_empty(len(lens), *out.shape[1:])
            decode_attention(query[rows], key[rows], value[rows], pool, tables, lens, found, params.of(rows))
            out[rows] = found

    def _paged_prefill(self, pool: KVPool, query: Tensor, out: Tensor, params: AttentionParams) -> None:
        if self._paged is None:
            self._paged = Paged.of(self.prefills, self.prefill_rows, self.positions.device)
        paged, rows = self._paged, self._paged.rows
        places = paged.block_tables, paged.query_starts, paged.context_lens
        if isinstance(rows, slice):
            prefill_attention(query[rows], pool, *places, out[rows], params)
        else:
            found = out.new_empty(len(rows), *out.shape[1:])
            prefill_attention(query[rows], pool, *places, found, params)
            out[rows] = found

    def _varlen_calls(self, pool: KVPool, window: int | None, device: torch.device) -> list[Varlen]:
        most_blocks = self.scratch_bytes // (pool.keys[0].nbytes + pool.values[0].nbytes)
        at = window, pool.block_size, most_blocks, device
        if at not in self._varlens:
            self._varlens[at] = Varlen.calls(self.prefills, *at)
        return self._varlens[at]

    @staticmethod
    def _varlen(
        attend: Callable[..., Tensor],
        call: Varlen,
        pool: KVPool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        """Of the call's chunks: [their tokens, heads, value width]."""
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        if call.blocks is not None:
            keys, values = pool.ops.gather(pool.keys, pool.values, call.blocks)
        return attend(
            query[call.rows],
            keys,
            values,
            call.query_starts,
            call.key_starts,
            call.key_lens,
            call.most_queries,
            call.most_keys,
            scale=params.scale_of(query),
            window=params.window,
        )

    def _masked(
        self,
        prefill: Prefill,
        pool: KVPool | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        params: AttentionParams,
    ) -> None:
        """A chunk, with masks, in pieces whose scores are not too many."""
        _, heads, width = query.shape
        groups = heads // key.shape[0]
        if pool is None or prefill.is_whole:
            before, keys, values = 0, key[:, prefill.lo : prefill.hi], value[:, prefill.lo : prefill.hi]
        else:
            before = prefill.first_key(params.window) // pool.block_size * pool.block_size
            keys, values = pool.gather(self._blocks_of(prefill, params.window, pool.block_size))
        for piece in prefill.pieces(params.window, self.scratch_bytes // (heads * SCORE_BYTES)):
            seen = slice(piece.first_key(params.window) - before, piece.context_len - before)
            # [1, key heads, groups * count, width]: queries that share their keys stand together
            asked = query[piece.lo : piece.hi].view(piece.count, -1, groups, width).permute(1, 2, 0, 3).flatten(1, 2)
            mask = self._mask(piece, params.window, groups, query)
            found = attend(asked[None], keys[None, :, seen], values[None, :, seen], mask, params)[0]
            found = found.view(-1, groups, piece.count, value.shape[-1]).permute(2, 0, 1, 3)
            out[piece.lo : piece.hi] = found.flatten(1, 2)

    def _blocks_of(self, prefill: Prefill, window: int | None, block_size: int) -> Tensor:
        """[n] int64: those with the keys that a chunk sees."""
        at = prefill.lo, window, block_size
        if at not in self._blocks:
            blocks = np.array(prefill.blocks(window, block_size), dtype=np.int64)
            self._blocks[at] = upload(blocks, self.positions.device)
        return self._blocks[at]

    def _mask(self, piece: Prefill, window: int | None, groups: int, like: Tensor) -> Tensor | None:
        """What to add to the scores of a piece: [1, 1, groups * new tokens, keys]; None: nothing. Kept for other layers
        as far as there is room."""
        if piece.count == 1:
            return None  # it sees all that there is
        key = piece.lo, piece.hi, window, groups, like.dtype, like.device
        if (mask := self._masks.get(key)) is None:
            new = torch.arange(piece.context_len - piece.count, piece.context_len, device=like.device)
            seen = torch.arange(piece.first_key(window), piece.context_len, device=like.device)
            hidden = _hidden_keys(seen, new, window)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
            mask = mask.repeat(groups, 1)[None, None]
            if sum(one.nbytes for one in [*self._masks.values(), mask]) <= self.scratch_bytes:
                self._masks[key] = mask
        return mask


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool: KVPool,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    params: AttentionParams,
) -> None:
    """See `steer_ops.paged_attention_decode`."""
    if pool.keys.device != block_tables.device:  # the model is spread over several
        block_tables, context_lens = block_tables.to(pool.keys.device), context_lens.to(pool.keys.device)
    cos, sin = params.rotary or (None, None)
    pool.ops.decode(
        query,
        key,
        value,
        pool.keys,
        pool.values,
        block_tables,
        context_lens,
        out,
        scale=params.scale_of(query),
        window=params.window,
        softcap=params.softcap,
        sinks=params.sinks,
        cos=cos,
        sin=sin,
    )


def prefill_attention(
    query: Tensor,
    pool: KVPool,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    params: AttentionParams,
) -> None:
    """See `steer_ops.paged_attention_prefill`."""
    assert pool.ops.prefill is not None, "asked for where there is a kernel"
    places = (one.to(pool.keys.device) for one in (block_tables, query_starts, context_lens))
    pool.ops.prefill(
        query, pool.keys, pool.values, *places, out, scale=params.scale_of(query), window=params.window, **params.rules
    )


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, params: AttentionParams) -> Tensor:
    """query [rows, heads, asked, width], keys and values [rows, heads, keys, width], mask broadcastable to the scores
    -> [rows, heads, asked, value width]. Step by step where PyTorch's own has no argument for it: capped scores
    (Gemma 2) and sinks (GPT-OSS)."""
    if params.softcap is None and params.sinks is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=params.scale)
    scores = query @ keys.transpose(2, 3) * params.scale_of(query)
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if mask is not None:
        scores = scores + mask
    if params.sinks is not None:
        rows, heads, asked, _ = scores.shape
        sink = params.sinks.view(1, heads, -1, 1).expand(rows, heads, -1, asked * heads // len(params.sinks))
        scores = torch.cat([scores, sink.reshape(rows, heads, asked, 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values


def _hidden_keys(keys: Tensor, last: Tensor, window: int | None) -> Tensor:
    """keys [K], last [...]: the last key that each token may see -> [..., K] bool: what it must not."""
    hidden = keys > last[..., None]
    return hidden | (keys <= last[..., None] - window) if window else hidden


def padded_tables(tables: Sequence[Sequence[int]], rows: int | None = None, padding: int = 0) -> NDArray[np.int32]:
    """Block tables as [rows, blocks of the longest]; `padding` stands where a table has ended, and in further rows."""
    padded = np.full((rows or len(tables), max(map(len, tables), default=1)), padding, dtype=np.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    return padded


def _groups(
    singles: list[tuple[int, ChunkLayout]], block_size: int, *, by_length: bool
) -> list[list[tuple[int, ChunkLayout]]]:
    """Single tokens that are attended to in one call: all together where each row is read to its own length, else those
    with as many blocks, as every row of a call is read as far as the longest."""
    if by_length or len(singles) < 2:
        return [singles] if singles else []
    by_blocks: dict[int, list[tuple[int, ChunkLayout]]] = {}
    for single in singles:
        by_blocks.setdefault(-(-single[1].end // block_size), []).append(single)
    return list(by_blocks.values())


def _decodes(singles: list[tuple[int, ChunkLayout]], block_size: int, device: torch.device) -> Decodes:
    counts = [-(-chunk.end // block_size) for _, chunk in singles]
    tables = np.zeros((len(singles), max(counts)), dtype=np.int32)
    for row, (_, chunk) in enumerate(singles):
        tables[row, : counts[row]] = (chunk.block_table or ())[: counts[row]]
    lens = np.array([chunk.end for _, chunk in singles], dtype=np.int32)
    return Decodes(_span([place for place, _ in singles], device), upload(tables, device), upload(lens, device))


def _span(places: list[int], device: torch.device) -> slice | Tensor:
    """Places of the line, as a slice where they are neighbours: that is no copy."""
    first = places[0] if places else 0
    if places == list(range(first, first + len(places))):
        return slice(first, first + len(places))
    return upload(np.array(places, dtype=np.int64), device)
