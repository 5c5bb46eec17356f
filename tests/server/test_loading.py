"""How much memory the KV cache takes, and how long texts may be."""

import logging
from pathlib import Path

import pytest

from server import loading
from server.config import Settings, load_settings
from server.engine.model_runner import ModelRunner
from server.errors import StartupError
from server.loading import choose_block_size, load_model, num_kv_cache_blocks
from tests.broken_models import RAN
from tests.server.conftest import tiny_llama
from tests.server.desk import Desk


def test_what_is_no_usable_model_ends_the_start_with_one_sentence(broken_model: tuple[str, str]) -> None:
    id, said = broken_model
    with pytest.raises(StartupError, match=said) as caught:
        load_model(Settings(model=id, device="cpu", threads=1))
    assert "\n" not in caught.value.message


def test_code_of_a_folder_runs_where_it_is_trusted_alone(
    model_with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(model_with_code), "device": "cpu", "threads": 1}
    with pytest.raises(StartupError, match="only with --trust-remote-code"):
        load_model(load_settings(**options))
    assert not Path(RAN).exists()
    monkeypatch.setenv("MATSTEER_TRUST_REMOTE_CODE", "true")
    assert type(load_model(load_settings(**options)).model).__name__ == "MysteryModel"


STEP = {"max_num_seqs": 4, "max_num_batched_tokens": 64}


@pytest.fixture
def runner() -> ModelRunner:
    """A token takes 384 bytes: 3 layers, 2 heads, keys and values of 8 float32 each."""
    found = Desk(tiny_llama(64)).runner
    assert found.attention.token_bytes == 384
    return found


def test_the_cache_takes_what_is_set_and_not_more_than_sequences_can_use(runner: ModelRunner) -> None:
    assert num_kv_cache_blocks(runner, 32, limit=96, mib=1, **STEP) == 2 * 4 * 3, "twice what four of 96 tokens can use"
    many = STEP | {"max_num_seqs": 100}
    assert num_kv_cache_blocks(runner, 32, limit=96, mib=1, **many) == 2**20 // 384 // 32
    assert num_kv_cache_blocks(runner, 7, limit=96, mib=1, **many) == 2**20 // 384 // 7


def test_little_memory_makes_texts_shorter_and_says_so(runner: ModelRunner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        blocks = num_kv_cache_blocks(runner, 32, limit=100_000, mib=1, **STEP)
    assert blocks == 2**20 // 384 // 32
    assert "tokens, not 100000" in caplog.text


def test_a_text_is_bound_by_the_memory_alone_where_the_model_sets_no_limit(runner: ModelRunner) -> None:
    assert num_kv_cache_blocks(runner, 32, limit=None, mib=1, **STEP) == 2**20 // 384 // 32


def test_a_share_of_the_memory_that_is_free_is_taken(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_container_bytes", lambda: 384 * 32 * 1000)
    for share, blocks in ((0.25, 250), (0.5, 500)):
        assert num_kv_cache_blocks(runner, 32, limit=None, cpu_kv_cache_share=share, **STEP) == blocks


def test_no_memory_at_all_is_a_sentence(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_free_bytes", lambda *args: 5000)
    with pytest.raises(StartupError, match="There is no memory for keys and values: a token takes 384 bytes"):
        num_kv_cache_blocks(runner, 32, limit=96, **STEP)


def test_a_containers_own_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "CGROUP", tmp_path)
    whole = loading._container_bytes()
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert loading._container_bytes() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert loading._container_bytes() == whole


def test_blocks_are_as_large_as_is_fastest_or_as_is_said(runner: ModelRunner) -> None:
    assert choose_block_size(runner, 48) == 48
    assert choose_block_size(Desk(tiny_llama(64), native=False).runner) == loading.LARGE_BLOCK_SIZE
