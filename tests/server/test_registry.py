"""A name means the same for everybody, and a folder is what it is now."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from server.errors import UnknownCheckpoint, UnusableCheckpoint
from server.registry import Registry, fits_model
from steering.columns import ColumnBank, Handle


def at_once(work: Callable[[], Handle]) -> "Future[Handle]":
    future: Future[Handle] = Future()
    future.set_result(work())
    return future


@pytest.fixture
def registry(model: Any, tmp_path: Path) -> Registry:
    return Registry(tmp_path, ColumnBank(device="cpu", max_tokens=1), fits_model(model, "tiny", None), at_once)


@pytest.fixture
def put(checkpoints: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a version of demo into the registry's folder, under the name "mine"."""
    return lambda version: Path(shutil.copytree(checkpoints / "demo" / version, tmp_path / "mine" / version))


def test_a_plain_name_keeps_its_version_whatever_others_load(registry: Registry, put: Callable[[str], Path]) -> None:
    put("1")
    assert registry.load("mine").version == "1"
    put("2")
    assert registry.load("mine@2").version == "2"
    assert registry.load("mine").version == "1"


def test_a_version_that_others_load_first_does_not_become_the_plain_name(
    registry: Registry, put: Callable[[str], Path]
) -> None:
    put("1")
    put("2")
    first = registry.load("mine@1")
    assert registry.load("mine").version == "2"
    assert registry.load("mine@1") is first


def test_a_plain_name_means_the_active_version(registry: Registry, put: Callable[[str], Path]) -> None:
    put("1")
    put("2")
    assert registry.load("mine").version == "2"
    registry.activate("mine@1")
    assert registry.load("mine").version == "1"


@pytest.mark.parametrize("reference", ["mine@", "@", "@1", "mine@1@", "mine@1@2", ""])
def test_a_reference_without_a_name_or_a_version_is_unknown(
    registry: Registry, put: Callable[[str], Path], reference: str
) -> None:
    put("1")
    with pytest.raises(UnknownCheckpoint):
        registry.load(reference)


def test_a_folder_that_has_been_mended_can_be_used(registry: Registry, put: Callable[[str], Path]) -> None:
    tensors = put("1") / "steering.safetensors"
    sound = tensors.read_bytes()
    tensors.write_bytes(b"?")
    with pytest.raises(UnusableCheckpoint):
        registry.load("mine")
    assert registry.entries()[0].problem
    tensors.write_bytes(sound)
    assert registry.entries()[0].problem is None
    assert registry.load("mine").version == "1"


def test_a_folder_that_has_been_damaged_since_is_listed_as_such(registry: Registry, put: Callable[[str], Path]) -> None:
    tensors = put("1") / "steering.safetensors"
    assert registry.entries()[0].problem is None
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"fork")
    os.utime(tensors, ns=(1, 1))
    assert "sha256" in (registry.entries()[0].problem or "")
    tensors.unlink()
    assert "no steering.safetensors" in (registry.entries()[0].problem or "")


def test_a_folder_that_has_been_replaced_is_listed_as_what_is_served(
    registry: Registry, put: Callable[[str], Path]
) -> None:
    put("1")
    served = registry.load("mine")
    other = put("2")
    assert not registry.entries()[0].changed
    for name in ("config.json", "steering.safetensors"):
        shutil.copy(other / name, other.parent / "1" / name)
    entry = registry.entries()[0]
    assert entry.changed
    assert entry.checkpoint is served.checkpoint
