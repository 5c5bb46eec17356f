"""Decoding steps from CUDA graphs: the same kernels without the host's work in between.

A graph replays fixed shapes at fixed addresses. So a step of single tokens is put into static buffers of the next
larger bucket: rows up to a power of two (the rest are idle and write to a place of their own), keys up to a power of
two. Attention gathers each row's keys by an index computed on the device. Sampling stays outside.

Graphs are captured when they are first needed and again when the bank's buffers have moved (`ColumnBank.version`). On a
CPU, where nothing is captured, `Graphs` runs the same static step as it is: that is how tests reach it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.store import Store, lines
from server.engine.tape import Work
from server.engine.torch_attention import Rules, attention, hidden_keys
from steering.row_table import upload

log = logging.getLogger(__name__)
SHORTEST = 256  # keys: below this, smaller buckets would only be more graphs
WARMUPS = 2  # passes before a capture, in which libraries set themselves up


@dataclass
class StaticPlan:
    """A plan whose tensors are filled anew for every step: one token a row, `keys` of each row at most."""

    keys: int
    inputs: Tensor  # [5, rows] int64: ids, positions, starts and sizes of extents, idle
    _shared: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, keys: int, device: torch.device) -> "StaticPlan":
        return cls(keys, torch.zeros(5, rows, dtype=torch.int64, device=device))

    def fill(self, works: Sequence[Work], idle: int, ids: Tensor | None = None) -> None:
        """idle: where in the stores rows that have no work may write; ids: the tokens, where the host does not know
        them."""
        rows = self.inputs.shape[1]
        table = np.zeros((rows, 5), dtype=np.int64)
        table[:, 2:] = idle, 1, 1
        for row, work in zip(table, works, strict=False):
            extent = work.tape.extent
            assert extent is not None, "work is done on open tapes"
            token = work.tape.tokens[work.start] if ids is None else 0
            row[:] = token, work.start, extent.start, extent.size, 0
        self.inputs.copy_(upload(np.ascontiguousarray(table.T), self.inputs.device), non_blocking=True)
        if ids is not None:
            self.inputs[0, : len(works)] = ids

    def begin(self) -> None:
        """Inside a graph everything that depends on the inputs is computed, once a pass."""
        self._shared.clear()

    def attend(self, store: Store | None, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
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
        _, places, starts, sizes, _ = self.inputs.unbind()
        return self._once(("written", heads), lambda: lines(starts, sizes, places, heads))

    def _where(self, heads: int) -> Tensor:
        """[rows, heads, keys]: the lines of each row's tokens; beyond its last one, the last."""
        _, places, starts, sizes, _ = self.inputs.unbind()

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


@dataclass(frozen=True)
class _Recorded:
    plan: StaticPlan
    logits: Tensor | None  # the graph's output; None: nothing was captured
    graph: Any
    version: int  # of the bank


class Graphs:
    """Static steps by bucket. `run` is the pass over a plan's inputs: ids and positions [1, N] -> logits [N, vocab]."""

    def __init__(self, run: Callable[[Tensor, Tensor, StaticPlan], Tensor], device: torch.device, *, idle: int) -> None:
        """`idle`: a token's place in the stores that belongs to no extent."""
        self._run = run
        self._device = device
        self._idle = idle
        self._captures = True
        self._pool: Any = None  # memory that all graphs share
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    @staticmethod
    def fits(works: Sequence[Work]) -> bool:
        """Whether a step is one of single tokens, each to be drawn from."""
        return all(len(work) == 1 and work.draws for work in works)

    @staticmethod
    def rows(works: Sequence[Work]) -> int:
        """The bucket's rows: as many tokens have to be filled in the bank."""
        return _power(len(works))

    def prepare(self, works: Sequence[Work], version: int, ids: Tensor | None) -> bool:
        """Records the bucket of these works unless it has been, with the bank at `version`; says whether it did."""
        bucket = self._bucket(works)
        recorded = self._recorded.get(bucket)
        if recorded is not None and recorded.version == version:
            return False
        plan = recorded.plan if recorded else StaticPlan.empty(*bucket, self._device)
        plan.fill(works, self._idle, ids)
        self._recorded[bucket] = self._record(plan, version)
        return True

    def __call__(self, works: Sequence[Work], ids: Tensor | None) -> Tensor:
        """Logits [works, vocab], after `prepare`. The bank has been filled for `rows` tokens. `ids`: see `fill`."""
        recorded = self._recorded[self._bucket(works)]
        recorded.plan.fill(works, self._idle, ids)
        if recorded.logits is None:
            return self._pass(recorded.plan)[: len(works)]
        recorded.graph.replay()
        return recorded.logits[: len(works)].clone()  # the next replay writes over it

    def _bucket(self, works: Sequence[Work]) -> tuple[int, int]:
        """Rows and keys."""
        return self.rows(works), max(SHORTEST, _power(max(work.stop for work in works)))

    def _record(self, plan: StaticPlan, version: int) -> _Recorded:
        if self._device.type != "cuda" or not self._captures:
            return _Recorded(plan, None, None, version)
        try:
            return self._capture(plan, version)
        except RuntimeError as error:  # a model whose host code looks at the device's values
            log.warning("decoding steps are not captured in CUDA graphs: %s", str(error).splitlines()[0])
            self._captures = False
            return _Recorded(plan, None, None, version)

    def _capture(self, plan: StaticPlan, version: int) -> _Recorded:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._pass(plan)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._pass(plan)
        self._pool = self._pool or graph.pool()
        return _Recorded(plan, logits, graph, version)

    def _pass(self, plan: StaticPlan) -> Tensor:
        plan.begin()
        return self._run(plan.inputs[:1], plan.inputs[1:2], plan)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
