"""Static steps, which CUDA graphs replay: when they are captured, and what serves whom. Here they run uncaptured."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


def test_all_sizes_are_captured_on_one_stream_of_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this thread's device is; and a capture that was broken off leaves its memory pool to nobody else. (What
    a GPU makes of it: tests/server/test_gpu.py.)"""
    device, captures, warm_ups = torch.device("cuda", 1), [], []
    pools = iter((0, number) for number in range(1, 9))
    fails = False

    @contextmanager
    def graph(graph: object, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        captures.append((pool, stream))
        yield
        if fails:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def stream(stream: Stream) -> AbstractContextManager[None]:
        warm_ups.append(stream)
        return nullcontext()

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": stream, "graph": graph, "CUDAGraph": object}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    graphs = CudaGraphs(
        lambda ids, *rest: torch.zeros(ids.numel(), 5), device,
        block_size=4, padding_block=0, most_rows=4, most_blocks=3,
    )  # fmt: skip
    for fails in (False, False, True, False):
        with pytest.raises(RuntimeError) if fails else nullcontext():
            graphs._record(DecodeMetadata.empty(2, 3, torch.device("cpu")))
    [used] = {one for _, one in captures}
    assert used.device == device
    assert warm_ups == [used] * 4
    assert [pool for pool, _ in captures] == [(0, 1), (0, 1), (0, 1), (0, 2)]


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
