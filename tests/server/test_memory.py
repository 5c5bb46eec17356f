"""How much memory the cache takes, and how long texts may be."""

import logging
from pathlib import Path

import pytest

from server.engine.forward import Forward
from server.errors import StartupError
from server.opening import memory
from server.opening.memory import cache_size
from tests.server.conftest import tiny_llama
from tests.server.desk import Desk


@pytest.fixture
def forward() -> Forward:
    """A token takes 384 bytes: 3 layers, 2 heads, keys and values of 8 float32 each."""
    found = Desk(tiny_llama(64)).runner.forward
    assert found.attention.token_bytes == 384
    return found


def test_the_cache_takes_what_is_set_and_not_more_than_rows_can_use(forward: Forward) -> None:
    largest, count = cache_size(forward, limit=96, rows=4, mib=1)
    assert (largest, count) == (96, 8), "twice what four rows can use"
    largest, count = cache_size(forward, limit=96, rows=100, mib=1)
    assert (largest, count) == (96, 2**20 // 384 // 96)
    largest, count = cache_size(forward, limit=100, rows=4, mib=1)
    assert largest >= 100
    while largest >= 32:
        assert largest % 2 == 0
        largest //= 2


def test_little_memory_makes_texts_shorter_and_says_so(forward: Forward, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        largest, count = cache_size(forward, limit=100_000, rows=4, mib=1)
    assert largest <= 2**20 // 384 // 2
    assert count >= 2, "a text and its twin"
    assert f"{largest} tokens, not 100000" in caplog.text


def test_without_a_limit_a_text_may_have_half_the_cache(forward: Forward) -> None:
    largest, count = cache_size(forward, limit=None, rows=4, mib=1)
    assert largest * count * 384 <= 2**20
    assert count == 2


def test_no_memory_at_all_is_a_sentence(forward: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 5000)
    with pytest.raises(StartupError, match="There is no memory for keys and values: a token takes 384 bytes"):
        cache_size(forward, limit=96, rows=4, mib=0)


def test_a_containers_own_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory._container_bytes()
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._container_bytes() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes() == whole
