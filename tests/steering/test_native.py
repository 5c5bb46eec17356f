"""Compiling for this CPU: once for a user, and what happens where it cannot be."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steering import native

SOURCE = Path(native.__file__).with_name("steer.cpp")
ARGUMENTS = (ctypes.c_void_p,) * 11
needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet."""

    def forget() -> None:
        native._library.cache_clear()
        native._compiler.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "mat-steer"
    forget()


@needs_compiler
def test_it_is_compiled_once_for_a_user(cache: Path) -> None:
    functions = native.kernels(SOURCE, ARGUMENTS)
    assert functions is not None
    assert set(functions) == {torch.float32, torch.bfloat16}
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    native._library.cache_clear()
    assert native.kernels(SOURCE, ARGUMENTS)
    assert [one.stat().st_mtime_ns for one in cache.iterdir()] == [written]


@needs_compiler
def test_what_is_no_library_is_made_anew(cache: Path) -> None:
    assert native.kernels(SOURCE, ARGUMENTS)
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is still loaded
    library.write_bytes(b"nothing")
    native._library.cache_clear()
    assert native.kernels(SOURCE, ARGUMENTS)
    assert library.read_bytes()[:1000] == whole[:1000]


@needs_compiler
@pytest.mark.parametrize("opened", ["file", "folder"])
def test_what_others_can_write_to_is_not_run(cache: Path, opened: str) -> None:
    assert native.kernels(SOURCE, ARGUMENTS)
    (library,) = cache.iterdir()
    library.unlink()
    library.write_bytes(b"somebody else's")
    (library if opened == "file" else cache).chmod(0o777)
    native._library.cache_clear()
    assert native.kernels(SOURCE, ARGUMENTS)
    assert len(library.read_bytes()) > 1000, "made anew"


@needs_compiler
def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert native.kernels(SOURCE, ARGUMENTS)


@needs_compiler
def test_functions_that_the_compiler_left_out_are_left_out() -> None:
    functions = native.kernels(SOURCE, ARGUMENTS, (torch.float32, torch.float16))
    assert functions is not None
    assert set(functions) == {torch.float32}


@needs_compiler
def test_another_source_is_another_library(cache: Path, tmp_path: Path) -> None:
    assert native.kernels(SOURCE, ARGUMENTS)
    other = tmp_path / "steer.cpp"
    other.write_text(SOURCE.read_text() + "// changed")
    assert native.kernels(other, ARGUMENTS)
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_to_is_done_without(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in its place")
    assert native.kernels(SOURCE, ARGUMENTS)


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.kernels(SOURCE, ARGUMENTS)


def test_a_compiler_that_fails_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not native.kernels(SOURCE, ARGUMENTS)
    assert "steer.cpp cannot be compiled" in caplog.text


@needs_compiler
def test_it_computes_with_the_threads_of_pytorch() -> None:
    assert native.kernels(SOURCE, ARGUMENTS)
    ours, theirs = (
        # As the dynamic linker finds it: for a library without dependencies, and for PyTorch.
        ctypes.cast(ctypes.CDLL(name).omp_get_max_threads, ctypes.c_void_p).value
        for name in (None, str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    )
    assert ours == theirs, "a second runtime would have threads of its own"
