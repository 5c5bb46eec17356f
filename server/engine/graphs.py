"""Decoding steps from CUDA graphs: the same kernels without the host's work in between.

A graph replays fixed shapes at fixed addresses. So a step of single tokens is put into static buffers of the next
larger bucket: rows up to a power of two, keys up to a power of two. Sampling stays outside.

Graphs are captured when they are first needed and again when the bank's buffers have moved (`ColumnBank.version`). On a
CPU, where nothing is captured, `Graphs` runs the same static step as it is: that is how tests reach it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.attention.static_plan import StaticPlan
from server.engine.tape import Work

log = logging.getLogger(__name__)
SHORTEST = 256  # keys: below this, smaller buckets would only be more graphs
WARMUPS = 2  # passes before a capture, in which libraries set themselves up


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

    def prepare(self, works: Sequence[Work], ids: Tensor, version: int) -> bool:
        """Records the bucket of these works unless it has been, with the bank at `version`; says whether it did."""
        bucket = self._bucket(works)
        recorded = self._recorded.get(bucket)
        if recorded is not None and recorded.version == version:
            return False
        plan = recorded.plan if recorded else StaticPlan.empty(*bucket, self._device)
        self._fill(plan, works, ids)
        self._recorded[bucket] = self._record(plan, version)
        return True

    def __call__(self, works: Sequence[Work], ids: Tensor) -> Tensor:
        """ids [works] -> logits [works, vocab], after `prepare`. The bank has been filled for `rows` tokens."""
        recorded = self._recorded[self._bucket(works)]
        self._fill(recorded.plan, works, ids)
        if recorded.logits is None:
            return self._pass(recorded.plan)[: len(works)]
        recorded.graph.replay()
        return recorded.logits[: len(works)].clone()  # the next replay writes over it

    def _fill(self, plan: StaticPlan, works: Sequence[Work], ids: Tensor) -> None:
        plan.fill([work.chunk for work in works], ids, self._idle)

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
