"""A pass of single tokens in static shapes: what a CUDA graph can replay.

Rows beyond those that there are have no work, and write to a place of their own. Attention gathers each row's keys by
an index that is computed on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.attention.places import Chunk
from server.attention.store import Store, lines
from server.attention.torch_attention import Rules, attention, hidden_keys
from steering.row_table import upload


@dataclass
class StaticPlan:
    """A plan whose tensors are filled anew for every step: one token a row, `keys` of each row at most."""

    keys: int
    inputs: Tensor  # [4, rows] int64: ids, positions, starts and sizes of extents
    _shared: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, keys: int, device: torch.device) -> "StaticPlan":
        return cls(keys, torch.zeros(4, rows, dtype=torch.int64, device=device))

    def fill(self, chunks: Sequence[Chunk], ids: Tensor, idle: int) -> None:
        """chunks of one token each, ids [chunks]; idle: where in the stores rows that have no work may write.
        They keep the ids that they had: nobody reads what becomes of them."""
        table = np.zeros((self.inputs.shape[1], 3), dtype=np.int64)
        table[:, 1:] = idle, 1
        for row, chunk in zip(table, chunks, strict=False):
            assert chunk.extent is not None, "only what is kept goes on"
            row[:] = chunk.start, chunk.extent.start, chunk.extent.size
        self.inputs[0, : len(ids)] = ids
        self.inputs[1:].copy_(upload(np.ascontiguousarray(table.T), self.inputs.device), non_blocking=True)

    def begin(self) -> None:
        """Inside a graph everything that depends on the inputs is computed, once a pass."""
        self._shared.clear()

    def attend(self, store: Store | None, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """See `Plan`."""
        assert store is not None, "graphs run on a model that has been tried"
        rows, heads, width = query.shape
        key_heads = key.shape[1]
        store.write(self._written(key_heads), key[0], value[0])
        keys, values = store.gather(self._where(key_heads))
        asked = query.view(rows, key_heads, heads // key_heads, width)
        found = attention(asked, keys, values, self._mask(rules.window, query.dtype), rules)
        return found.reshape(rows, heads, -1)

    def _written(self, heads: int) -> Tensor:
        """[rows * heads]: where the tokens' keys and values go."""
        _, places, starts, sizes = self.inputs.unbind()
        return self._once(("written", heads), lambda: lines(starts, sizes, places, heads))

    def _where(self, heads: int) -> Tensor:
        """[rows, heads, keys]: the lines of each row's tokens; beyond its last one, the last."""
        _, places, starts, sizes = self.inputs.unbind()

        def where() -> Tensor:
            token = torch.minimum(torch.arange(self.keys, device=places.device), places[:, None])
            head = torch.arange(heads, device=places.device)[:, None]
            return (starts * heads)[:, None, None] + head * sizes[:, None, None] + token[:, None]

        return self._once(("where", heads), where)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, keys]"""
        places = self.inputs[1]

        def mask() -> Tensor:
            hidden = hidden_keys(torch.arange(self.keys, device=places.device), places, window)
            nothing = torch.zeros(hidden.shape, dtype=dtype, device=places.device)
            return nothing.masked_fill(hidden, -torch.inf)[:, None, None]

        return self._once(("mask", window, dtype), mask)

    def _once(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]
