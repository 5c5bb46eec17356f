"""Static steps, which CUDA graphs replay: when they are captured, and what serves whom. Here they run uncaptured."""

import gc
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from server.attention.static import DecodeMetadata
from server.engine import cuda_graphs
from server.engine.cuda_graphs import Bucket, CudaGraphs, capture_sizes
from server.engine.sequence import Sequence, SteeringParams
from steer_ops import PAGED_ATTENTION_DECODE
from steering.types import SequenceSteering
from tests.server.desk import Desk, sequence
from tests.server.reference import greedy, plain
from tests.server.test_architectures import columns, greedy_sequence, prefill_by_its_reference, tiny

COMPILED = PAGED_ATTENTION_DECODE.has_kernel(torch.device("cpu"), torch.float32)
MIX = {"kind": -1.0, "fair": 1.5}
needs_kernel = pytest.mark.skipif(not COMPILED, reason="nothing can be compiled here")


class Log:
    """What the graphs of a desk do, in order: captures, and steps by the rows of their bucket."""

    def __init__(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[tuple[str, int]] = []
        self.rooms: list[int] = []  # tokens of the buckets of those steps
        runner = desk.runner
        forward, capture, static = runner.forward, CudaGraphs.capture, CudaGraphs.__call__
        inside = False

        def step(*args: Any) -> Any:
            nonlocal inside
            inside, before = True, len(self.lines)
            try:
                return forward(*args)
            finally:
                inside = False
                if len(self.lines) == before:
                    self.lines.append(("other step", sum(map(len, args[0]))))

        def captured(graphs: CudaGraphs, bucket: Bucket, version: int) -> None:
            assert not inside, "a request's step waits for a capture"
            self.lines.append(("capture", bucket.rows))
            capture(graphs, bucket, version)

        def replayed(graphs: CudaGraphs, bucket: Bucket, *args: Any) -> Any:
            self.lines.append(("step", bucket.rows))
            self.rooms.append(bucket.tokens)
            return static(graphs, bucket, *args)

        runner.forward = step  # type: ignore[method-assign]
        monkeypatch.setattr(CudaGraphs, "capture", captured)
        monkeypatch.setattr(CudaGraphs, "__call__", replayed)

    def of(self, *kinds: str) -> list[int]:
        return [rows for kind, rows in self.lines if kind in kinds]


def buckets(desk: Desk) -> list[Bucket]:
    assert desk.runner._graphs is not None
    return list(desk.runner._graphs._captured)


def asked(*lengths: int) -> list[Sequence]:
    """Prompts of three tokens that begin differently."""
    return [greedy_sequence((10 + index, 6, 7), new, SteeringParams()) for index, new in enumerate(lengths)]


def run(desk: Desk, sequences: list[Sequence]) -> None:
    """Their texts are the plain model's."""
    for one, text in desk.run(sequences).items():
        assert text == plain(tiny("llama"), one.prompt_token_ids, new=one.sampling_params.max_new_tokens)


def test_sizes_are_vllms() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(6) == [1, 2, 4, 6]
    assert capture_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert capture_sizes(512)[-18:] == [248, *range(256, 513, 16)]
    assert len(capture_sizes(256)) == 35


@needs_kernel
def test_all_sizes_are_captured_at_the_start_the_largest_first_and_none_later(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tiny("llama"), block_size=2, graphs=True)
    assert buckets(desk) == [(8, 64, 8), (4, 64, 4), (2, 64, 2), (1, 64, 1)]
    log = Log(desk, monkeypatch)
    run(desk, asked(3, 5, 16))
    assert not log.of("capture")
    assert log.of("other step") == [9], "the prompts"
    assert log.of("step") == [4] * 2 + [2] * 2 + [1] * 11


@needs_kernel
def test_steps_with_prompts_come_from_the_smallest_graph_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel attends to chunks in blocks; those of whose tokens several have logits do not."""
    prefill_by_its_reference(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "MIXED_SIZES", (4, 16, 24))
    desk = Desk(tiny("llama"), block_size=2, graphs=True, max_num_batched_tokens=24)
    sizes = [(8, 64, 24), (8, 64, 16), (8, 64, 8), (3, 64, 4), (4, 64, 4), (2, 64, 2), (1, 64, 1)]
    assert sorted(buckets(desk)) == sorted(sizes)
    assert [bucket.tokens for bucket in buckets(desk)] == [24, 16, 8, 4, 4, 2, 1]
    log = Log(desk, monkeypatch)
    handle = desk.bank.add(columns("llama"))
    desk.runner.capture_graphs()
    steering = SteeringParams(SequenceSteering.of([(handle, (-1.0, 1.5))]))
    prompts = (5, 6, 7, 8), tuple(range(3, 33)), (9, 10)
    steered = [greedy_sequence(prompt, 8, steering) for prompt in prompts]
    scored = sequence((5, 6, 7), continuation=(8, 9))
    desk.add(scored)
    log.lines.clear()
    texts = desk.run(steered, arrivals=[0, 2, 4])
    for one in steered:
        expected = greedy(tiny("llama"), one.prompt_token_ids, columns("llama"), MIX, new=8, eos=None)
        assert texts[one] == expected
        assert desk.steered(one) == 8
    assert scored.logprobs
    assert log.lines[0] == ("other step", 4), "two tokens of one text are scored in it"
    assert log.lines[1] == ("other step", 1), "metrics trace it"
    assert "other step" not in dict(log.lines[2:])
    assert log.rooms[:3] == [24, 16, 4], "prompts beside tokens: of 23 and 1, 7 and 1, 2 and 2"


@needs_kernel
def test_columns_that_move_the_bank_are_captured_between_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tiny("llama"), graphs=True)
    log = Log(desk, monkeypatch)
    [running] = asked(12)
    desk.add(running)
    for _ in range(3):
        desk.step()
    handle = desk.bank.add(columns("llama"))
    steering = SteeringParams(SequenceSteering.of([(handle, (-1.0, 1.5))]))
    steered = greedy_sequence((5, 6, 7, 8), 6, steering)
    desk.add(steered)
    while steered not in desk.finished or running not in desk.finished:
        desk.step()
    assert list(desk.finished[running].token_ids) == plain(tiny("llama"), running.prompt_token_ids, new=12)
    expected = greedy(tiny("llama"), steered.prompt_token_ids, columns("llama"), MIX, new=6, eos=None)
    assert list(desk.finished[steered].token_ids) == expected
    assert desk.steered(steered) == 6
    before = log.lines.index(("capture", 8))
    assert log.lines[before:][:8] == [
        ("capture", 8), ("other step", 5),  # a prompt beside a token
        ("capture", 4), ("step", 4),
        ("capture", 2), ("step", 2),
        ("capture", 1), ("step", 2),
    ]  # fmt: skip
    assert log.of("capture") == [8, 4, 2, 1], "once each"
    log.lines.clear()
    desk.bank.add(columns("llama"))  # finds a free slot
    run(desk, asked(3))
    assert not log.of("capture")


@needs_kernel
def test_an_idle_engine_goes_on_with_its_captures() -> None:
    desk = Desk(tiny("llama"), graphs=True)
    desk.bank.add(columns("llama"))
    for left in (3, 2, 1, 0):
        desk.engine.step(wait=True)
        assert len(desk.runner.graphs_due) == left


@needs_kernel
def test_the_longest_text_bounds_the_tables_and_none_that_is_longer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tiny("llama"), block_size=2, graphs=True, limit=7)
    log = Log(desk, monkeypatch)
    run(desk, [greedy_sequence((5, 6, 7), 12, SteeringParams())])
    assert log.lines == [("other step", 3), *[("step", 1)] * 5, *[("other step", 1)] * 6]


def test_where_blocks_are_gathered_a_size_is_captured_after_the_first_step_that_misses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(tiny("llama"), num_blocks=16, block_size=2, graphs=True, native=False)
    assert not buckets(desk)
    log = Log(desk, monkeypatch)
    run(desk, asked(3, 5, 16))
    assert {bucket[:2] for bucket in buckets(desk)} == {(4, 2), (4, 4), (2, 4), (1, 4), (1, 8), (1, 16)}
    assert log.lines[:5] == [("other step", 9), ("other step", 3), ("capture", 4), ("other step", 3), ("capture", 4)]


class Fails:
    """Records, except of a bucket of so many rows, as often as is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, rows: int, times: int) -> None:
        real, self.left = CudaGraphs._record, times

        def record(graphs: CudaGraphs, metadata: Any) -> Any:
            if self.left and metadata.inputs.shape[1] == rows:
                self.left -= 1
                raise error
            return real(graphs, metadata)

        monkeypatch.setattr(CudaGraphs, "_record", record)


def hidden_behind(error: Exception, cause: Exception) -> Exception:
    """As when a capture is ended in which something has failed."""
    error.__context__ = cause
    return error


@needs_kernel
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried a lot."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        hidden_behind(
            RuntimeError("CUDA error: operation failed due to a previous error during capture"),
            torch.OutOfMemoryError("CUDA out of memory. Tried a lot."),
        ),
    ],
)
def test_a_size_that_finds_no_memory_is_served_by_a_larger_one_until_the_next_capture(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    Fails(monkeypatch, error, rows=2, times=1)
    desk = Desk(tiny("llama"), graphs=True)
    assert [bucket.rows for bucket in buckets(desk)] == [8, 4, 1]
    log = Log(desk, monkeypatch)
    run(desk, asked(3, 3))
    assert log.of("step") == [4, 4]
    desk.bank.add(columns("llama"))
    run(desk, asked(3, 8))
    assert [bucket.rows for bucket in buckets(desk)] == [8, 4, 2, 1]


@needs_kernel
def test_a_size_that_found_no_memory_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    Fails(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), rows=2, times=1)
    desk = Desk(tiny("llama"), graphs=True)
    assert not desk.runner.graphs_due
    monkeypatch.setattr(cuda_graphs, "RETRY_S", 0.0)
    assert desk.runner.graphs_due
    run(desk, asked(3, 3))
    assert [bucket.rows for bucket in buckets(desk)] == [8, 4, 1, 2]


@needs_kernel
def test_a_size_whose_tables_find_no_memory_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = DecodeMetadata.empty

    def empty(rows: int, *rest: Any) -> DecodeMetadata:
        if rows == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(rows, *rest)

    monkeypatch.setattr(DecodeMetadata, "empty", empty)
    desk = Desk(tiny("llama"), graphs=True)
    assert [bucket.rows for bucket in buckets(desk)] == [8, 4, 1]
    assert "no memory for the CUDA graph of 2 tokens" in caplog.text
    assert not desk.runner.steering.recording
    run(desk, asked(3, 3))


class OutOfResources(Exception):
    """As Triton's errors are: none of PyTorch's classes."""


@needs_kernel
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"),
         "operation not permitted when stream is capturing\n"),
        (RuntimeError(""), "RuntimeError\n"),
        (OutOfResources("out of resource: shared memory"), "out of resource: shared memory\n"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_captured_is_served_without_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, said: str
) -> None:
    Fails(monkeypatch, error, rows=4, times=9)
    desk = Desk(tiny("llama"), graphs=True)
    assert not buckets(desk)
    assert not desk.runner.graphs_due
    assert f"not captured in CUDA graphs: {said}" in caplog.text
    run(desk, asked(3, 3))


@needs_kernel
def test_captures_at_the_start_have_a_progress_bar_and_a_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hf_logging, "_tqdm_active", True)
    Fails(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), rows=2, times=1)
    with caplog.at_level(logging.INFO):
        Desk(tiny("llama"), graphs=True)
    assert "CUDA graphs of 3 sizes are captured, in " in caplog.text, "one has found no memory"
    shown = capsys.readouterr().err
    assert "Capturing CUDA graphs: 100%" in shown
    assert "4/4" in shown


class Stream:
    """Stands for one of CUDA's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        pass


class Cuda:
    """What PyTorch does for captures, as its allocator counts: where there is no GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.steps = Stream(torch.device("cuda", 1))
        self.captures: list[tuple[int, Stream]] = []  # their pools and streams
        self.warm_ups: list[Stream] = []
        self.flushes = 0
        self.users: Counter[int] = Counter()  # graphs of each pool
        self.recording: list[int] = []
        self.body_fails = self.end_fails = self.tells_allocator = False
        numbers = itertools.count(1)
        cuda = self

        class Graph:
            kept = False

            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                assert cuda.current is not cuda.steps
                assert pool not in cuda.recording
                assert cuda.users.get(pool) != 0, "a pool that nobody has, and that has not been flushed"
                cuda.users[pool] += 1
                cuda.recording.append(pool)
                cuda.captures.append((pool, cuda.current))
                self.number, self.ended = pool, False

            def capture_end(self) -> None:
                if not cuda.end_fails or cuda.tells_allocator:
                    cuda.recording.remove(self.number)
                if cuda.end_fails:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                self.ended = True

            def pool(self) -> int:
                assert self.ended
                return self.number

            def __del__(self) -> None:
                assert self.ended, "what the allocator points to"
                cuda.users[self.number] -= 1

        for name, fake in {
            "Stream": Stream, "current_stream": lambda device: self.current, "stream": self.stream,
            "CUDAGraph": Graph, "graph_pool_handle": lambda: next(numbers),
            "synchronize": lambda device: None, "empty_cache": self.empty_cache,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release)
        for owner, name in ((torch, "empty"), (torch, "zeros")):  # on the CPU
            real = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *shape, real=real, device=None, **more: real(*shape, **more))
        self.graphs = CudaGraphs(
            self.forward, self.steps.device, block_size=4, padding_block=0, most_rows=4, most_blocks=3
        )

    def forward(self, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if not self.recording:
            self.warm_ups.append(self.current)
        elif self.body_fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(ids.numel(), 5)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def empty_cache(self) -> None:
        self.flushes += 1
        self.users = +self.users

    def end(self, device: int, pool: int) -> None:
        assert device == 1
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool: int) -> None:
        assert device == 1
        self.users[pool] -= 1

    def capture(self, version: int, *sizes: int) -> list[int]:
        """Pools of the graphs that were captured, or that were to be."""
        start = len(self.captures)
        for rows in sizes:
            try:
                self.graphs.capture(Bucket(rows, 3, rows), version)
            except RuntimeError as error:
                self.graphs.give_up(
                    Bucket(rows, 3, rows), version, hidden_behind(error, torch.OutOfMemoryError("CUDA"))
                )
        assert self.current is self.steps
        assert not self.recording
        return [pool for pool, _ in self.captures[start:]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_round_of_captures_has_one_stream_one_pool_and_one_flush(cuda: Cuda) -> None:
    """Of the model's device, whatever this thread's is. (What a GPU makes of it: tests/server/test_gpu.py.)"""
    assert cuda.capture(0, 4, 2, 1) == [1, 1, 1]
    assert cuda.flushes == 1
    assert cuda.capture(1, 4, 2, 1) == [1, 1, 1]
    assert cuda.flushes == 2
    [used] = {stream for _, stream in cuda.captures}
    assert used.device == cuda.steps.device
    assert cuda.warm_ups == [used] * 12
    assert cuda.users == {1: 3}


def test_a_pool_whose_last_graph_is_gone_is_not_captured_to(cuda: Cuda) -> None:
    assert cuda.capture(0, 4) == [1]
    assert cuda.capture(0, 4) == [2]


def test_a_capture_that_finds_no_memory_is_followed_by_a_flush(cuda: Cuda) -> None:
    assert cuda.capture(0, 4) == [1]
    cuda.body_fails = True
    assert cuda.capture(0, 2) == [1]
    cuda.body_fails = False
    assert cuda.users == {1: 1}
    assert cuda.capture(0, 1, 2) == [1, 1], "the others go on in the same memory"
    assert cuda.flushes == 2


@pytest.mark.parametrize("tells", [True, False])
def test_a_capture_whose_end_fails_leaves_thread_and_allocator_as_they_were(cuda: Cuda, tells: bool) -> None:
    """Where PyTorch itself tells its allocator of the end, as from 2.13 on, and where it does not."""
    assert cuda.capture(0, 4) == [1]
    cuda.body_fails = cuda.end_fails = True
    cuda.tells_allocator = tells
    assert cuda.capture(0, 2) == [1]
    cuda.body_fails = cuda.end_fails = False
    gc.collect()
    assert cuda.users == {1: 1}, "the graph that is there"
    assert cuda.capture(0, 1) == [2]
    assert cuda.capture(1, 4, 2, 1) == [2, 2, 2]
    assert cuda.users == {2: 3}


@needs_kernel
def test_hooks_act_in_a_pass_that_is_recorded_whatever_the_batch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured while nobody was steered has to steer whoever comes."""
    desk = Desk(tiny("llama"), graphs=True)
    desk.bank.add(columns("llama"))
    acted: list[bool] = []
    real = cuda_graphs.CudaGraphs._record

    def record(graphs: CudaGraphs, metadata: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("steering.hook.fused_steer", lambda *args: acted.append(True))
            return real(graphs, metadata)

    monkeypatch.setattr(CudaGraphs, "_record", record)
    desk.runner.capture_graphs()
    assert len(acted) == 4
    assert not desk.bank.take_counts().any()
    assert not desk.runner.steering.recording
