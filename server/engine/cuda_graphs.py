"""Steps from CUDA graphs: the same kernels without the host's work in between.

A graph replays fixed shapes at fixed addresses. So a step of single tokens is put into static buffers of the next
larger bucket. Where a kernel reads each row to its own length, a bucket is of rows alone, serves texts of any length,
and all buckets are captured at the start. Where blocks are gathered, a bucket is also of the blocks of the longest
text, up to a power of two, and is captured after the first step that would have used it. Sampling stays outside.

A step with chunks of prompts among its tokens is put into a bucket of so many tokens together, where kernels attend to
single tokens and to any chunks in blocks. With more tokens than the largest of those has, the device takes longer than
the host.

Captures happen between steps, one at a time, the largest first: it serves all rows until the others are there. When the
bank's buffers have moved (`ColumnBank.version`), what was captured before is due again. A step that no graph serves is
computed like any other. On a CPU, where nothing is captured, `CudaGraphs` runs the same static steps as they are: that
is how tests reach them.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.attention.layout import ChunkLayout
from server.attention.static import DecodeMetadata, MixedMetadata, StaticMetadata
from server.engine.sequence import ScheduledChunk
from server.errors import is_out_of_memory
from steering.errors import first_line

log = logging.getLogger(__name__)
WARMUPS = 2  # passes before a capture, in which libraries set themselves up
RETRY_S = 300.0  # after which a capture that found no memory is tried again
MIXED_SIZES = (16, 32, 64, 128, 192, 256, 384, 512)  # tokens of steps with prompts among them
Chunks = tuple[ScheduledChunk, ...]


class Bucket(NamedTuple):
    """What a static step has room for."""

    rows: int  # texts
    blocks: int  # of each
    tokens: int  # of all together

    @property
    def is_mixed(self) -> bool:
        """Whether some of its texts may have several."""
        return self.tokens > self.rows

    @property
    def table_bytes(self) -> int:
        """Of its block tables, for each block of a text: int32, two of them where single tokens have one of their
        own."""
        return 4 * self.rows * (1 + self.is_mixed)


@dataclass(frozen=True)
class _Captured:
    metadata: StaticMetadata
    graph: Any  # None: nothing was captured
    version: int  # of the bank


def capture_sizes(most: int) -> list[int]:
    """Rows of the buckets, as vLLM's `cudagraph_capture_sizes`: 1, 2, 4, then steps of 8, from 256 on of 16."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most, 16)]
    return _up_to(most, sizes)


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    return [*(size for size in sizes if size < most), most]


class CudaGraphs:
    """Static steps by bucket. `forward`: a pass over ids and positions [1, N] -> logits [N, vocab], or those of the
    tokens [rows] that are named."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, StaticMetadata, Tensor | None], Tensor],
        device: torch.device,
        *,
        block_size: int,
        padding_block: int,
        most_rows: int,
        most_blocks: int | None,
        most_tokens: int = 0,
    ) -> None:
        """`padding_block`: a block that belongs to no sequence, for the rows of a bucket that have nothing to do.
        `most_blocks`: of the longest text, where attention reads every row to its own length; None: it does not.
        `most_tokens`: of a step with prompts, where attention reads chunks in blocks; 0: it does not."""
        self._forward = forward
        self._device = device
        self._block_size = block_size
        self._idle_block = padding_block
        self._sizes = capture_sizes(most_rows)
        most_tokens = min(most_tokens, MIXED_SIZES[-1])
        self._mixed_sizes = _up_to(most_tokens, MIXED_SIZES) if most_tokens else []
        self._most_blocks = most_blocks
        self._wanted: dict[Bucket, None] = {}
        self._captured: dict[Bucket, _Captured] = {}
        # Where a bucket could not be captured for want of memory: for which version of the bank, and when.
        self._no_memory: dict[Bucket, tuple[int, float]] = {}
        self._unable = False
        self._broken: set[Any] = set()  # memory pools of captures that could not even be ended
        self._round: int | None = None  # the version of the bank that was captured last
        self._flushed = False  # since then
        self._stream: Any = None  # what graphs are captured on
        self._logits: Tensor | None = None  # [most rows, vocab]: what all graphs write to

    def want_all(self) -> None:
        """From now on all buckets are due, where they are known beforehand."""
        if (blocks := self._most_blocks) is None:
            return
        buckets = [Bucket(rows, blocks, rows) for rows in self._sizes]
        buckets += [Bucket(min(self._sizes[-1], size - 1), blocks, size) for size in self._mixed_sizes]
        self._wanted = dict.fromkeys(sorted(buckets, key=lambda bucket: (bucket.tokens, bucket.rows), reverse=True))

    def due(self, version: int) -> list[Bucket]:
        """What is to be captured with the bank at `version`, in this order."""
        return [
            bucket
            for bucket in self._wanted
            if not self._has_failed(bucket, version) and not self._is_captured(bucket, version)
        ]

    def captured(self, version: int) -> list[Bucket]:
        """What has been captured with the bank at `version`."""
        return [bucket for bucket in self._captured if self._is_captured(bucket, version)]

    def capture(self, bucket: Bucket, version: int) -> None:
        """Captures a bucket, with the bank at `version`, between two steps. Whoever gets an error from it tells
        `give_up`."""
        if version != self._round:
            self._round, self._flushed = version, False
        before = self._captured.pop(bucket, None)  # its memory is free again
        metadata = before.metadata if before else self._empty(bucket)
        before = None
        metadata.fill((), torch.empty(0, dtype=torch.int64, device=self._device), self._idle_block)
        self._captured[bucket] = _Captured(metadata, self._record(metadata), version)

    def give_up(self, bucket: Bucket, version: int, error: Exception) -> None:
        """A bucket could not be captured. Where there was no memory for it, larger ones serve its rows, or none, until
        it is due again after `RETRY_S`; else there are no graphs any more."""
        if is_out_of_memory(error):
            log.warning("there is no memory for the CUDA graph of %d tokens", bucket.tokens)
            self._no_memory[bucket] = version, time.monotonic()
        else:  # a model whose host code looks at the device's values, a kernel that does not compile
            log.warning("steps are not captured in CUDA graphs: %s", first_line(error))
            self._wanted, self._captured, self._unable = {}, {}, True

    def find(self, chunks: Chunks, version: int) -> Bucket | None:
        """The smallest bucket for these chunks that has been captured with the bank at `version`."""
        longest = max(-(-chunk.end // self._block_size) for chunk in chunks)
        tokens = sum(map(len, chunks))
        singles = all(len(chunk) == 1 and chunk.is_sampled for chunk in chunks)
        if singles and self._most_blocks is None:
            longest = 1 << (longest - 1).bit_length()
            rows = next((size for size in self._sizes if size >= len(chunks)), None)
            if rows and not self._unable:
                self._wanted.setdefault(Bucket(rows, longest, rows))
        if not singles and any(chunk.num_rows > 1 for chunk in chunks):
            return None
        return min(
            (
                bucket
                for bucket in self.captured(version)
                if bucket.rows >= len(chunks)
                and bucket.blocks >= longest
                and bucket.tokens >= tokens
                and (bucket.is_mixed or singles)
            ),
            key=lambda bucket: (bucket.is_mixed, bucket.blocks, bucket.tokens),
            default=None,
        )

    def __call__(self, bucket: Bucket, chunks: Sequence[ChunkLayout], ids: Tensor) -> Tensor:
        """ids [N] -> logits [chunks, vocab], each of a chunk's last token, which the next static step writes over. The
        bank has been filled for the bucket's tokens."""
        captured = self._captured[bucket]
        captured.metadata.fill(chunks, ids, self._idle_block)
        if captured.graph is None:
            return self._run(captured.metadata)[: len(chunks)]
        captured.graph.replay()
        assert self._logits is not None, "made with the first graph"
        return self._logits[: len(chunks)]

    def _has_failed(self, bucket: Bucket, version: int) -> bool:
        failed, at = self._no_memory.get(bucket, (None, 0.0))
        return failed == version and time.monotonic() < at + RETRY_S

    def _is_captured(self, bucket: Bucket, version: int) -> bool:
        captured = self._captured.get(bucket)
        return captured is not None and captured.version == version

    def _empty(self, bucket: Bucket) -> StaticMetadata:
        if not bucket.is_mixed:
            return DecodeMetadata.empty(bucket.rows, bucket.blocks, self._device)
        return MixedMetadata.empty(*bucket, self._block_size, self._device)

    def _record(self, metadata: StaticMetadata) -> Any:
        if self._device.type != "cuda":
            self._run(metadata)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        steps = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(steps)
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUPS):
                logits = self._run(metadata)
        steps.wait_stream(self._stream)
        if self._logits is None:
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[-1])
        del logits
        if not self._flushed:  # a capture can take nothing of what PyTorch keeps for later
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            self._flushed = True
        graph, pool, ended = torch.cuda.CUDAGraph(), self._memory_pool(), False
        try:
            # Not `torch.cuda.graph`, which flushes before each capture, and leaves its stream to the thread where the
            # end of one fails. What other threads, which may load a checkpoint, ask of CUDA is none of its business.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    logits = self._run(metadata)
                    self._logits[: len(logits)].copy_(logits)
                    del logits
                finally:
                    graph.capture_end()
                    ended = True
        except Exception:
            self._flushed = False
            if not ended:
                self._abandon(graph, pool)
            raise
        return graph

    def _memory_pool(self) -> Any:
        """That of a graph that is there, so that all share one: PyTorch gives up a pool with its last graph."""
        pools = (captured.graph.pool() for captured in self._captured.values() if captured.graph is not None)
        return next((pool for pool in pools if pool not in self._broken), None) or torch.cuda.graph_pool_handle()

    def _abandon(self, graph: Any, pool: Any) -> None:
        """After a capture whose end has failed. PyTorch before 2.13 goes on as if it were under way, and none up to
        2.13 gives its share of the pool back."""
        self._broken.add(pool)  # PyTorch's pool of pinned memory goes by the same name, and cannot be mended
        for mend in torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool:
            with suppress(RuntimeError):  # it has been ended
                mend(self._stream.device.index, pool)
        # Never destroyed: what PyTorch keeps of the capture points to it, and a later PyTorch would release once more.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))

    def _run(self, metadata: StaticMetadata) -> Tensor:
        metadata.begin()
        return self._forward(metadata.ids, metadata.positions, metadata, metadata.keep)
