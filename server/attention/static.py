"""Passes in static shapes, at addresses that stay, filled anew for every step: what a CUDA graph can replay."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from server.attention.kv_pool import KVPool
from server.attention.layout import ChunkLayout
from server.attention.metadata import (
    AttentionMetadata,
    AttentionParams,
    decode_attention,
    padded_tables,
    prefill_attention,
)
from steer_ops import rotary
from steering.bank import upload


@dataclass
class DecodeMetadata:
    """A pass of single tokens.

    Rows beyond those that there are have nothing to do, and write to a block of their own.
    """

    inputs: Tensor  # [3, rows] int64: ids, positions, lengths
    block_tables: Tensor  # [rows, blocks] int32
    _shared: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, blocks: int, device: torch.device) -> "DecodeMetadata":
        inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        return cls(inputs, torch.zeros(rows, blocks, dtype=torch.int32, device=device))

    @property
    def ids(self) -> Tensor:
        """[1, rows]"""
        return self.inputs[:1].long()

    @property
    def positions(self) -> Tensor:
        """[1, rows]"""
        return self.inputs[1:2].long()

    @property
    def keep(self) -> None:
        """Logits are wanted of all tokens."""

    def fill(self, chunks: Sequence[ChunkLayout], ids: Tensor, padding_block: int) -> None:
        """chunks of one token each, ids [chunks]. Rows that have nothing to do keep the ids that they had: nobody reads
        what becomes of them."""
        self.inputs[0, : len(ids)] = ids
        self.place(chunks, padding_block)

    def place(self, chunks: Sequence[ChunkLayout], padding_block: int) -> None:
        """`fill`, all but the ids."""
        rows, blocks = self.block_tables.shape
        places = np.zeros((2, rows), dtype=np.int64)
        places[1] = 1
        for row, chunk in enumerate(chunks):
            places[:, row] = chunk.start, chunk.end
        held = [(chunk.block_table or ())[:blocks] for chunk in chunks]
        tables = padded_tables(held, rows, padding_block)  # what is beyond is not read
        self.inputs[1:].copy_(upload(places, self.inputs.device), non_blocking=True)
        self.block_tables[:, : tables.shape[1]].copy_(upload(tables, self.block_tables.device), non_blocking=True)

    def begin(self) -> None:
        """Drops derived tensors, so that they are computed inside the captured graph, once a pass."""
        self._shared.clear()

    def attend(self, pool: KVPool | None, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See `AttentionMetadata`."""
        assert pool is not None, "graphs run on a model that has been tried"
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        new_key, new_value = (part[0].transpose(0, 1) for part in (key, value))
        self.attend_rows(pool, query, new_key, new_value, out, params)
        return out

    def attend_rows(
        self, pool: KVPool, query: Tensor, key: Tensor, value: Tensor, out: Tensor, params: AttentionParams
    ) -> None:
        """See `steer_ops.paged_attention_decode`."""
        if "lens" not in self._shared:
            self._shared["lens"] = self.inputs[2].int()
        decode_attention(query, key, value, pool, self.block_tables, self._shared["lens"], out, params)


@dataclass
class MixedMetadata:
    """A pass of chunks of any lengths: of so many tokens together, and at most so many texts.

    The single tokens that it begins with are attended to as in a pass of their own, so that a long text is read by many
    programs; all other chunks together. Tokens beyond those that there are belong to no text, and are written to a
    block of their own.
    """

    singles: DecodeMetadata  # with a row for each text
    ids: Tensor  # [1, tokens] int64
    numbers: Tensor  # [3 * tokens] int64: positions; of each token its block, and its place in there
    # [3, texts + 1] int32. Of the other chunks: where each begins, then where the last one ends; lengths of the texts.
    # Of all chunks: the last token.
    starts: Tensor
    block_tables: Tensor  # [texts, blocks] int32, of the other chunks
    block_size: int

    @classmethod
    def empty(cls, texts: int, blocks: int, tokens: int, block_size: int, device: torch.device) -> "MixedMetadata":
        ids, numbers = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((1, tokens), 3 * tokens))
        starts, tables = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in ((3, texts + 1), (texts, blocks))
        )
        return cls(DecodeMetadata.empty(texts, blocks, device), ids, numbers, starts, tables, block_size)

    @property
    def positions(self) -> Tensor:
        """[1, tokens]"""
        return self.numbers[: self.ids.shape[1]][None]

    @property
    def keep(self) -> Tensor:
        """[texts] int64: the last token of each."""
        return self.starts[2, :-1].long()

    def fill(self, chunks: Sequence[ChunkLayout], ids: Tensor, padding_block: int) -> None:
        """See `DecodeMetadata.fill`. ids [tokens of the chunks]."""
        tokens, (texts, blocks) = self.ids.shape[1], self.block_tables.shape
        singles = sum(1 for _ in takewhile(lambda chunk: len(chunk) == 1, chunks))
        self.singles.place(chunks[:singles], padding_block)
        others = [(chunk.block_table or ())[:blocks] for chunk in chunks[singles:]]
        tables = padded_tables(others, texts)  # the rest is not read
        positions, places = np.zeros(tokens, dtype=np.int64), np.zeros((tokens, 2), dtype=np.int64)
        places[:, 0] = padding_block
        starts = np.zeros((3, texts + 1), dtype=np.int32)
        starts[0] = end = singles
        starts[2, :singles] = range(singles)
        positions[:singles] = [chunk.start for chunk in chunks[:singles]]
        for row, chunk in enumerate(chunks[singles:]):
            begin, end = end, end + len(chunk)
            own = positions[begin:end] = np.arange(chunk.start, chunk.end)
            places[begin:end, 0] = tables[row, own // self.block_size]
            places[begin:end, 1] = own % self.block_size
            starts[0, row + 1 :] = end
            starts[1, row] = chunk.end
            starts[2, singles + row] = end - 1
        self.ids[0, : len(ids)] = ids
        numbers = np.concatenate([positions, places.reshape(-1)])
        for static, now in ((self.numbers, numbers), (self.starts, starts)):
            static.copy_(upload(now, static.device), non_blocking=True)
        self.block_tables[:, : tables.shape[1]].copy_(upload(tables, self.block_tables.device), non_blocking=True)

    def begin(self) -> None:
        """See `DecodeMetadata`."""
        self.singles.begin()

    def attend(self, pool: KVPool | None, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See `AttentionMetadata`."""
        assert pool is not None, "graphs run on a model that has been tried"
        new_key, new_value = (part[0].transpose(0, 1) for part in (key, value))
        if params.rotary is not None:
            query, new_key = rotary(query, new_key, *params.rotary)
            params = replace(params, rotary=None)
        pool.write(self.numbers[len(query) :].view(-1, 2), new_key.transpose(0, 1), value[0])
        # What no text's tokens get is a number: no layer chokes on it.
        out = query.new_zeros(*query.shape[:2], value.shape[-1])
        # Rows that have no single token write to `out`, too; what the chunks' tokens get is written over that.
        rows = slice(len(self.block_tables))
        self.singles.attend_rows(pool, query[rows], new_key[rows], new_value[rows], out[rows], params)
        starts, lens, _ = self.starts
        prefill_attention(query, pool, self.block_tables, starts, lens[:-1], out, params)
        return out


StaticMetadata = DecodeMetadata | MixedMetadata
ForwardMetadata = AttentionMetadata | StaticMetadata
