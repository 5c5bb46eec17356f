"""Compiling for this CPU: once for a user, and what happens where it cannot be."""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import steer_ops
from steer_ops import RMS_NORM, plain
from steer_ops.cpu import build

needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="there is no C++ compiler")
SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_loaded", {})
    return tmp_path / "cache" / "mat-steer"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    found = tmp_path / "small.cpp"
    found.write_text(SMALL)
    return found


def answer(source: Path) -> int | None:
    """By a library that this process has not loaded yet."""
    build._loaded.clear()
    library = build.load(source)
    return library.answer() if library else None


@needs_compiler
def test_it_is_compiled_once_for_a_user(cache: Path, source: Path) -> None:
    assert answer(source) == 42
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    assert answer(source) == 42
    assert [one.stat().st_mtime_ns for one in cache.iterdir()] == [written]


@needs_compiler
def test_threads_that_ask_at_the_same_time_get_one_library(source: Path) -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(build.load(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert found[0] is not None
    assert all(one is found[0] for one in found)


@needs_compiler
def test_what_is_no_library_is_made_anew(cache: Path, source: Path) -> None:
    assert answer(source) == 42
    (library,) = cache.iterdir()
    library.unlink()  # it is still loaded
    library.write_bytes(b"nothing")
    assert answer(source) == 42
    assert library.read_bytes()[:4] == b"\x7fELF"


@needs_compiler
@pytest.mark.parametrize("opened", ["file", "folder"])
def test_what_others_can_write_to_is_not_run(cache: Path, source: Path, opened: str) -> None:
    assert answer(source) == 42
    (library,) = cache.iterdir()
    library.unlink()
    library.write_bytes(b"somebody else's")
    (library if opened == "file" else cache).chmod(0o777)
    assert answer(source) == 42
    assert library.read_bytes()[:4] == b"\x7fELF", "made anew"


@needs_compiler
def test_a_user_without_a_home_keeps_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert answer(source) == 42


@needs_compiler
@pytest.mark.parametrize("changed", ["source", "header", "torch"])
def test_what_the_library_is_made_of_has_changed(
    cache: Path, source: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(source) == 42
    if changed == "source":
        source.write_text(SMALL.replace("42", "43"))
    elif changed == "header":
        source.with_name("some.h").write_text("// new")
    else:
        monkeypatch.setattr(torch, "__version__", "2.99")
    assert answer(source) == (43 if changed == "source" else 42)
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_to_is_done_without(cache: Path, source: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in its place")
    assert answer(source) == 42


def test_without_a_compiler_there_is_none(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    caplog.set_level("INFO")
    assert answer(source) is None
    assert "there is no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_told_of(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert answer(source) is None
    assert "small.cpp cannot be compiled" in caplog.text


@needs_compiler
def test_it_computes_with_the_threads_of_pytorch(tmp_path: Path) -> None:
    threads = tmp_path / "threads.cpp"
    threads.write_text('#include <omp.h>\nextern "C" void *runtime() { return (void *)&omp_get_max_threads; }\n')
    library = build.load(threads)
    assert library is not None
    library.runtime.restype = ctypes.c_void_p
    theirs = ctypes.CDLL(str(build.TORCH / "lib" / "libtorch_cpu.so")).omp_get_max_threads
    assert library.runtime() == ctypes.cast(theirs, ctypes.c_void_p).value, "a second runtime has threads of its own"


def test_without_a_compiler_the_ops_are_computed_by_their_twins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(RMS_NORM, "_chosen", {})
    x, weight = torch.randn(3, 8), torch.ones(8)
    assert not RMS_NORM.has_kernel(x.device, x.dtype)
    assert torch.equal(steer_ops.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
