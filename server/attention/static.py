"""Passes in static shapes, at addresses that stay, filled anew for every step: what a CUDA graph can replay."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        rows, blocks = self.block_tables.shape
        places = np.zeros((2, rows), dtype=np.int64)
        places[1] = 1
        for row, chunk in enumerate(chunks):
            places[:, row] = chunk.start, chunk.end
        held = [(chunk.block_table or ())[:blocks] for chunk in chunks]
        tables = padded_tables(held, rows, padding_block)  # what is beyond is not read
        self.inputs[0, : len(ids)] = ids
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
        if "lens" not in self._shared:
            self._shared["lens"] = self.inputs[2].int()
        decode_attention(query, new_key, new_value, pool, self.block_tables, self._shared["lens"], out, params)
        return out


@dataclass
class MixedMetadata:
    """A pass of chunks of any lengths: of so many tokens together, and at most so many texts.

    Tokens beyond those that there are belong to no text, and are written to a block of their own.
    """

    ids: Tensor  # [1, tokens] int64
    numbers: Tensor  # [3 * tokens] int64: positions; of each token its block, and its place in there
    starts: Tensor  # [2, texts + 1] int32: where each chunk begins, then where the last one ends; lengths of the texts
    block_tables: Tensor  # [texts, blocks] int32
    block_size: int

    @classmethod
    def empty(cls, texts: int, blocks: int, tokens: int, block_size: int, device: torch.device) -> "MixedMetadata":
        ids, numbers = (torch.zeros(size, dtype=torch.int64, device=device) for size in ((1, tokens), 3 * tokens))
        starts, tables = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in ((2, texts + 1), (texts, blocks))
        )
        return cls(ids, numbers, starts, tables, block_size)

    @property
    def positions(self) -> Tensor:
        """[1, tokens]"""
        return self.numbers[: self.ids.shape[1]][None]

    @property
    def keep(self) -> Tensor:
        """[texts] int64: the last token of each."""
        return (self.starts[0, 1:] - 1).clamp_min(0).long()

    def fill(self, chunks: Sequence[ChunkLayout], ids: Tensor, padding_block: int) -> None:
        """See `DecodeMetadata.fill`. ids [tokens of the chunks]."""
        tokens, (texts, blocks) = self.ids.shape[1], self.block_tables.shape
        tables = padded_tables([(chunk.block_table or ())[:blocks] for chunk in chunks], texts)  # the rest is not read
        positions, places = np.zeros(tokens, dtype=np.int64), np.zeros((tokens, 2), dtype=np.int64)
        places[:, 0] = padding_block
        starts = np.zeros((2, texts + 1), dtype=np.int32)
        end = 0
        for row, chunk in enumerate(chunks):
            begin, end = end, end + len(chunk)
            own = positions[begin:end] = np.arange(chunk.start, chunk.end)
            places[begin:end, 0] = tables[row, own // self.block_size]
            places[begin:end, 1] = own % self.block_size
            starts[:, row + 1] = end, 0
            starts[1, row] = chunk.end
        starts[0, len(chunks) :] = end
        self.ids[0, : len(ids)] = ids
        numbers = np.concatenate([positions, places.reshape(-1)])
        for static, now in ((self.numbers, numbers), (self.starts, starts)):
            static.copy_(upload(now, static.device), non_blocking=True)
        self.block_tables[:, : tables.shape[1]].copy_(upload(tables, self.block_tables.device), non_blocking=True)

    def begin(self) -> None:
        """Nothing is derived from what has been filled in."""

    def attend(self, pool: KVPool | None, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """See `AttentionMetadata`."""
        assert pool is not None, "graphs run on a model that has been tried"
        new_key = key[0].transpose(0, 1)
        if params.rotary is not None:
            query, new_key = rotary(query, new_key, *params.rotary)
        pool.write(self.numbers[len(query) :].view(-1, 2), new_key.transpose(0, 1), value[0])
        # What no text's tokens get is a number: no layer chokes on it.
        out = query.new_zeros(*query.shape[:2], value.shape[-1])
        starts, lens = self.starts
        prefill_attention(query, pool, self.block_tables, starts, lens[:-1], out, params)
        return out


StaticMetadata = DecodeMetadata | MixedMetadata
ForwardMetadata = AttentionMetadata | StaticMetadata
