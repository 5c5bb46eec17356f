"""Decoding steps from CUDA graphs: the same kernels without the host's work in between.

A graph replays fixed shapes at fixed addresses. So a step of single tokens is put into static buffers of the next
larger bucket: sequences up to a power of two. Where a kernel reads each row to its own length, one bucket serves texts
of any length; where blocks are gathered, a bucket is also of the blocks of the longest text, up to a power of two.
Sampling stays outside.

Graphs are captured when they are first needed and again when the bank's buffers have moved (`ColumnBank.version`). On a
CPU, where nothing is captured, `CudaGraphs` runs the same static step as it is: that is how tests reach it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.attention.metadata import DecodeMetadata
from server.engine.sequence import ScheduledChunk

log = logging.getLogger(__name__)
WARMUPS = 2  # passes before a capture, in which libraries set themselves up
Chunks = tuple[ScheduledChunk, ...]


@dataclass(frozen=True)
class _Captured:
    metadata: DecodeMetadata
    logits: Tensor | None  # the graph's output; None: nothing was captured
    graph: Any
    version: int  # of the bank


class CudaGraphs:
    """Static steps by bucket. `forward`: a pass over ids and positions [1, N] -> logits [N, vocab]."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, DecodeMetadata], Tensor],
        device: torch.device,
        *,
        block_size: int,
        padding_block: int,
        most_blocks: int | None,
    ) -> None:
        """`padding_block`: a block that belongs to no sequence, for the rows of a bucket that have nothing to do.
        `most_blocks`: of the longest text, where attention reads every row to its own length; None: it does not."""
        self._forward = forward
        self._device = device
        self._block_size = block_size
        self._idle_block = padding_block
        self._most_blocks = most_blocks
        self._captures = True
        self._pool: Any = None  # memory that all graphs share
        self._captured: dict[tuple[int, int], _Captured] = {}

    @staticmethod
    def fits(chunks: Chunks) -> bool:
        """Whether a step is one of single tokens, each to be sampled from."""
        return all(len(chunk) == 1 and chunk.is_sampled for chunk in chunks)

    @staticmethod
    def rows(chunks: Chunks) -> int:
        """The bucket's rows: as many tokens have to be filled in the bank."""
        return _power_of_two(len(chunks))

    def prepare(self, chunks: Chunks, ids: Tensor, version: int) -> bool:
        """Captures the bucket of these chunks unless it has been, with the bank at `version`; says whether it did."""
        bucket = self._bucket(chunks)
        captured = self._captured.get(bucket)
        if captured is not None and captured.version == version:
            return False
        metadata = captured.metadata if captured else DecodeMetadata.empty(*bucket, self._device)
        self._fill(metadata, chunks, ids)
        self._captured[bucket] = self._capture(metadata, version)
        return True

    def __call__(self, chunks: Chunks, ids: Tensor) -> Tensor:
        """ids [chunks] -> logits [chunks, vocab], after `prepare`. The bank has been filled for `rows` tokens."""
        captured = self._captured[self._bucket(chunks)]
        self._fill(captured.metadata, chunks, ids)
        if captured.logits is None:
            return self._run(captured.metadata)[: len(chunks)]
        captured.graph.replay()
        return captured.logits[: len(chunks)].clone()  # the next replay writes over it

    def _fill(self, metadata: DecodeMetadata, chunks: Chunks, ids: Tensor) -> None:
        metadata.fill([chunk.layout for chunk in chunks], ids, self._idle_block)

    def _bucket(self, chunks: Chunks) -> tuple[int, int]:
        """Rows, and blocks that their tables have room for."""
        longest = max(-(-chunk.end // self._block_size) for chunk in chunks)
        if self._most_blocks and longest <= self._most_blocks:
            return self.rows(chunks), self._most_blocks
        return self.rows(chunks), _power_of_two(longest)

    def _capture(self, metadata: DecodeMetadata, version: int) -> _Captured:
        if self._device.type != "cuda" or not self._captures:
            return _Captured(metadata, None, None, version)
        try:
            return self._record(metadata, version)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model whose host code looks at the device's values
            log.warning("decoding steps are not captured in CUDA graphs: %s", str(error).splitlines()[0])
            self._captures = False
            return _Captured(metadata, None, None, version)

    def _record(self, metadata: DecodeMetadata, version: int) -> _Captured:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._run(metadata)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(metadata)
        self._pool = self._pool or graph.pool()
        return _Captured(metadata, logits, graph, version)

    def _run(self, metadata: DecodeMetadata) -> Tensor:
        metadata.begin()
        return self._forward(metadata.inputs[:1].long(), metadata.inputs[1:2].long(), metadata)


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
