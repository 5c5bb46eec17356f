"""How much memory the KV cache takes, and what a step takes beside it."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server import memory
from server.attention.kv_pool import KVOps
from server.config import Settings
from server.engine.cuda_graphs import Bucket, CudaGraphs
from server.engine.model_runner import ModelRunner
from server.errors import StartupError
from server.memory import choose_block_size, profile_run
from steer_ops import PAGED_ATTENTION_DECODE, plain
from tests.server.conftest import tiny_llama
from tests.server.desk import Desk
from tests.server.test_architectures import tiny


def settings(**given: Any) -> Settings:
    return Settings(**({"max_num_seqs": 4, "max_num_batched_tokens": 64} | given))


def num_kv_cache_blocks(runner: ModelRunner, block_size: int, settings: Settings, **more: Any) -> int:
    return memory.num_kv_cache_blocks(runner, block_size, settings, settings.step_limits("cpu"), **more)


@pytest.fixture
def runner() -> ModelRunner:
    """A token takes 384 bytes: 3 layers, 2 heads, keys and values of 8 float32 each."""
    found = Desk(tiny_llama(64)).runner
    assert found.attention.token_bytes == 384
    return found


def test_the_cache_takes_what_is_set_and_not_more_than_sequences_can_use(runner: ModelRunner) -> None:
    few, many = settings(kv_cache_mib=1), settings(kv_cache_mib=1, max_num_seqs=64)
    assert num_kv_cache_blocks(runner, 32, few, max_model_len=96) == 2 * 4 * 3, "twice what four of 96 tokens can use"
    assert num_kv_cache_blocks(runner, 32, many, max_model_len=96) == 2**20 // 384 // 32
    assert num_kv_cache_blocks(runner, 7, many, max_model_len=96) == 2**20 // 384 // 7


def test_little_memory_makes_texts_shorter_and_says_so(runner: ModelRunner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        blocks = num_kv_cache_blocks(runner, 32, settings(kv_cache_mib=1), max_model_len=100_000)
    assert blocks == 2**20 // 384 // 32
    assert "tokens, not 100000" in caplog.text


def test_a_text_is_bound_by_the_memory_alone_where_the_model_sets_no_limit(runner: ModelRunner) -> None:
    assert num_kv_cache_blocks(runner, 32, settings(kv_cache_mib=1)) == 2**20 // 384 // 32


def test_a_share_of_what_the_largest_step_leaves_is_taken(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_container_bytes", lambda: 384 * 32 * 1000)
    steps = []

    def peak(devices: set[torch.device], step: Any) -> dict[torch.device, int]:
        steps.append(step())
        return dict.fromkeys(devices, 384 * 32 * 200)

    monkeypatch.setattr(memory, "_peak_bytes", peak)
    for share, blocks in ((0.25, 200), (0.5, 400)):
        assert num_kv_cache_blocks(runner, 32, settings(cpu_kv_cache_share=share), max_model_len=9000) == blocks
    assert len(steps[0]) == 5, "four texts that are sampled and one that is scored"
    assert all(output.sampled and output.sampled.logprob for output in steps[0][:4])
    assert len(steps[0][4].scored.logprobs) == 60, "a step has 64 tokens"


@pytest.mark.skipif(
    not PAGED_ATTENTION_DECODE.has_kernel(torch.device("cpu"), torch.float32), reason="nothing can be compiled here"
)
def test_the_cache_leaves_what_graphs_will_take(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest takes 300 tokens' worth, and each of the six others as much as the second: 50; and what their block
    tables of 282 blocks take."""
    token, left, captured = 384, [10_000, 9_700, 9_700, 9_650], []
    monkeypatch.setattr(memory, "_container_bytes", lambda: token * 32 * 1000)
    monkeypatch.setattr(memory, "_peak_bytes", lambda devices, step: dict.fromkeys(devices, 0))
    monkeypatch.setattr(memory, "_free_bytes", lambda device: left.pop(0) * token)
    real = CudaGraphs.capture

    def capture(graphs: CudaGraphs, bucket: Bucket, version: int) -> None:
        captured.append(bucket.rows)
        real(graphs, bucket, version)

    monkeypatch.setattr(CudaGraphs, "capture", capture)
    many = settings(max_num_seqs=32, cpu_kv_cache_share=1)
    blocks = num_kv_cache_blocks(runner, 32, many, graph_rows=32, max_model_len=9000)
    tables = 4 * 282 * (1 + 2 + 4 + 8 + 16 + 24 + 32) / token
    assert blocks == int((32 * 1000 - 300 - 6 * 50 - tables) // 32)
    assert captured == [32, 24]
    assert runner._graphs is None


def test_what_is_set_outright_needs_no_measurement(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "profile_run", lambda *args: pytest.fail("measured"))
    num_kv_cache_blocks(runner, 32, settings(kv_cache_mib=1), max_model_len=96)


@pytest.mark.skipif(not (memory.PROC / "clear_refs").exists(), reason="Linux alone tells a process's peak")
def test_a_larger_step_takes_more_memory() -> None:
    runner = Desk(tiny_llama(64)).runner

    def peak(**given: Any) -> int:
        return max(profile_run(runner, 32, settings(**given).step_limits("cpu"), 4096).values())

    # A mask of float32 for 2,000 tokens that see 4,096, twice as two query heads share a key head.
    assert peak(max_num_batched_tokens=2004) - peak() > 2000 * 4096 * 4
    freed = [bytearray(100_000) for _ in range(2000)]  # what the heap keeps of it is not taken as free
    freed = freed[-1:]
    assert peak(max_num_batched_tokens=2004) - peak() > 2000 * 4096 * 4
    assert freed


@pytest.mark.skipif(not (memory.PROC / "clear_refs").exists(), reason="Linux alone tells a process's peak")
def test_scores_of_a_long_prompt_take_no_more_than_their_share() -> None:
    """Capped scores, which are computed step by step: whole they would be 1,000 x 2,048 in 4 heads, 31 MiB."""
    runner = Desk(tiny("gemma2")).runner

    def peak(scratch: int) -> int:
        runner.attention.scratch_bytes = scratch
        limits = settings(max_num_batched_tokens=1004).step_limits("cpu")
        return max(profile_run(runner, 32, limits, 2048).values())

    small, large = peak(2**22), peak(2**40)
    assert large > 1000 * 2048 * 4 * 4
    assert small < large / 3


def test_the_largest_step_is_full_and_gathers_all_that_one_call_may(runner: ModelRunner) -> None:
    limits = settings().step_limits("cpu")
    runner.allocate(1, 32)

    def chunks(longest: int) -> list[int]:
        step = memory._largest_step(runner, limits, longest)
        assert all(chunk.end == longest for chunk in step)
        assert [len(chunk) for chunk in step[:4]] == [1] * 4
        return [len(chunk) for chunk in step[4:]]

    assert chunks(100) == [60]
    assert chunks(50) == [50, 10], "texts are shorter than a step"
    assert chunks(10) == [10] * 4, "no more are scored at a time"
    gathered: list[int] = []

    def gather(keys: Tensor, values: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        gathered.append(len(blocks) * 32)
        return plain.gather_kv(keys, values, blocks)

    attention, kernels = runner.attention, KVOps(gather=gather, varlen=plain.varlen_attention)
    attention.pools = {layer: replace(pool, ops=kernels) for layer, pool in attention.pools.items()}
    attention.scratch_bytes = 128 * 200  # a token takes 128 bytes in each of three layers
    assert attention.gathered_tokens == 200
    assert chunks(50) == [50, 6, 2, 2]
    assert chunks(250) == [60], "one text is more"
    assert chunks(64) == [56, 2, 2]
    runner.execute_async(memory._largest_step(runner, limits, 64)).result()
    assert gathered == [192] * 3


def test_a_step_that_fails_ends_the_start_with_one_sentence(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried a lot.")

    monkeypatch.setattr(runner, "forward", forward)
    with pytest.raises(StartupError, match=r"\(64 tokens, 5 texts of up to 96\) fails: CUDA out of memory\. S"):
        num_kv_cache_blocks(runner, 32, settings(), max_model_len=96)


def test_what_pytorch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after layers have been exchanged."""
    free, device = [100], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.insert(0, 10_000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 20_000))
    assert memory._cache_bytes(device, settings(gpu_memory_utilization=0.75), 500) == 10_000 - 500 - 5_000


def test_no_memory_at_all_is_a_sentence(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_cache_bytes", lambda *args: 5000)
    with pytest.raises(StartupError, match="There is no memory for keys and values: a token takes 384 bytes"):
        num_kv_cache_blocks(runner, 32, settings(), max_model_len=96)


def test_a_containers_own_limit_counts_without_cached_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory._container_bytes()
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 30\n")
    assert memory._container_bytes() == 430
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes() == whole


def test_blocks_are_as_large_as_is_fastest_or_as_is_said(runner: ModelRunner) -> None:
    assert choose_block_size(runner, 48) == 48
    assert choose_block_size(Desk(tiny_llama(64), native=False).runner) == memory.LARGE_BLOCK_SIZE
