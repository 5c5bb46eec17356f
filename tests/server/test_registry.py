"""A name means the same for everybody, a folder is what it is now, and a restart finds what was served."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.errors import CheckpointInUse, UnknownCheckpoint, UnusableCheckpoint
from server.registry import CheckpointLease, Registry, fits_model
from server.registry_state import NAME, RegistryState, read_state, write_state
from steering import checkpoint as folders
from steering.bank import ColumnBank
from steering.errors import ColumnError
from steering.types import Handle


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
    assert entry.config is served.checkpoint.config


def test_a_folder_that_was_replaced_is_served_once_it_is_reloaded(
    registry: Registry, put: Callable[[str], Path]
) -> None:
    put("1")
    old = registry.activate("mine")
    held = registry.acquire(None)
    assert held is old
    other = put("2")
    for name in ("config.json", "steering.safetensors"):
        shutil.copy(other / name, other.parent / "1" / name)
    assert registry.acquire("mine@1") is old, "nobody asked for the new one"
    new = registry.reload("mine", "1")
    assert new is not old
    assert registry.reload("mine", "1") is new, "nothing has changed since"
    assert registry.acquire(None) is new, "active is the name and version, whatever it holds"
    assert registry._bank.columns(old.handle), "two requests still run on it"
    registry.release(old)
    registry.release(old)
    with pytest.raises(ColumnError):
        registry._bank.columns(old.handle)
    registry.release(new)
    assert registry.pins == 0


def test_what_cannot_be_used_never_replaces_what_can(registry: Registry, put: Callable[[str], Path]) -> None:
    put("1")
    good = registry.activate("mine")
    (put("2") / "steering.safetensors").write_bytes(b"?")
    for version in (None, "2"):
        with pytest.raises(UnusableCheckpoint):
            registry.reload("mine", version, activate=True)
    with pytest.raises(UnknownCheckpoint, match=r"no checkpoint 'mine@3'\. Of 'mine' there are 1, 2\."):
        registry.reload("mine", "3")
    assert registry.active is good
    assert registry.load("mine") is good


def test_reloading_a_plain_name_gives_its_newest_version(registry: Registry, put: Callable[[str], Path]) -> None:
    put("1")
    assert registry.activate("mine").version == "1"
    put("2")
    assert registry.reload("mine").version == "2"
    assert registry.active is not None
    assert registry.active.version == "1"
    assert registry.reload("mine", activate=True).version == "2"
    assert registry.active.version == "2"


def test_an_unloaded_version_serves_who_holds_it_and_comes_back_when_asked(
    registry: Registry, put: Callable[[str], Path]
) -> None:
    put("1")
    put("2")
    assert registry.acquire("mine@1") is None, "it is not loaded yet"
    registry.load("mine@1")
    first = registry.acquire("mine@1")
    assert first is not None
    registry.activate("mine@2")
    with pytest.raises(CheckpointInUse):
        registry.unload("mine")
    assert registry.unload("mine", "1") == ["mine@1"]
    assert registry.unload("mine", "1") == []
    assert registry._bank.columns(first.handle)
    again = registry.load("mine@1")
    assert again is not first
    registry.release(first)
    with pytest.raises(ColumnError):
        registry._bank.columns(first.handle)
    with pytest.raises(UnknownCheckpoint):
        registry.unload("nobody")
    with pytest.raises(UnknownCheckpoint):
        registry.unload("mine", "3")


def test_what_is_released_while_it_is_unloaded_leaves_the_bank_once(
    registry: Registry, put: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    registry.load("mine@1")
    held, removed = registry.acquire("mine@1"), []
    assert held is not None
    monkeypatch.setattr(registry._bank, "remove", removed.append)
    registry.on_change = lambda: registry.release(held)  # between the two
    registry.unload("mine")
    assert removed == [held.handle]


def test_a_folder_that_is_gone_is_listed_with_what_is_loaded_of_it(
    registry: Registry, put: Callable[[str], Path], tmp_path: Path
) -> None:
    put("1")
    put("2")
    registry.activate("mine@1")
    shutil.rmtree(tmp_path / "mine")
    (entry,) = registry.entries()
    assert (entry.version, entry.loaded, entry.active, entry.changed) == ("1", True, True, True)
    assert entry.problem is not None
    assert "folder is gone" in entry.problem
    assert registry.entries("mine") == [entry]
    assert registry.entries("other") == []


@pytest.mark.parametrize("kind", ["a file", "a link in a circle", "a folder"])
def test_a_state_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    root = tmp_path / "checkpoints"
    if kind == "a file":
        root.write_text("in place of the folder")
    elif kind == "a link in a circle":
        root.symlink_to(root)
    else:
        (root / NAME).mkdir(parents=True)
    write_state(root, RegistryState("tiny", "demo@1"))
    assert "will not be restored" in caplog.text
    assert not root.is_dir() or sorted(root.iterdir()) == [root / NAME]


def test_a_lease_of_two_owners_lasts_until_both_release_it(registry: Registry, put: Callable[[str], Path]) -> None:
    put("1")
    registry.load("mine")
    lease = CheckpointLease(registry)
    other = lease.acquire()
    lease.add("mine")
    lease.close()
    lease.close()
    assert registry.pins == 1
    other()
    assert registry.pins == 0


def test_a_closed_lease_keeps_nothing(registry: Registry, put: Callable[[str], Path]) -> None:
    put("1")
    registry.load("mine")
    lease = CheckpointLease(registry)
    lease.add("mine")
    lease.close()
    lease.add("mine")  # a thread that was still at it
    lease.close()
    assert registry.pins == 0


@pytest.fixture
def own(settings: Settings, checkpoints: Path, tmp_path: Path) -> Settings:
    """A server with a checkpoints folder of its own, which remembers."""
    root = shutil.copytree(checkpoints, tmp_path / "checkpoints")
    return settings.model_copy(update={"checkpoints": root, "remember": True})


def state(client: TestClient) -> tuple[str | None, set[str]]:
    listed = client.get("/checkpoints").json()
    return listed["active"], {f"{one['name']}@{one['version']}" for one in listed["checkpoints"] if one["loaded"]}


def test_a_restart_finds_what_was_served(own: Settings) -> None:
    with TestClient(create_app(own)) as client:
        assert state(client) == ("demo@2", {"demo@2"})
        assert not (own.checkpoints / NAME).exists(), "nobody has changed anything"
        client.post("/checkpoints/demo/load", json={"version": "1"})
        client.post("/checkpoints/other/activate")
        client.delete("/checkpoints/demo?version=2")
        expected = state(client)
    with TestClient(create_app(own)) as client:
        assert state(client) == expected == ("other@1", {"demo@1", "other@1"})
        answer = client.post("/generate", json={"prompt": "a", "checkpoint": "demo", "max_new_tokens": 1}).json()
        assert answer["results"][0]["steering"]["version"] == "1", "the plain name means what it meant"
    with TestClient(create_app(own.model_copy(update={"checkpoint": "demo@2"}))) as client:
        assert state(client)[0] == "demo@2", "what is said at the start goes before what was"


def test_what_is_gone_or_belongs_to_another_model_is_passed_over(
    own: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(create_app(own)) as client:
        client.post("/checkpoints/other/activate")
    shutil.rmtree(own.checkpoints / "other")
    with TestClient(create_app(own)) as client:
        assert state(client)[0] == "demo@2"
    assert "other@1 was active before, and cannot be now" in caplog.text
    kept = json.loads((own.checkpoints / NAME).read_text())
    (own.checkpoints / NAME).write_text(json.dumps(kept | {"model": "another", "active": "demo@1"}))
    with TestClient(create_app(own)) as client:
        assert state(client)[0] == "demo@2"


def test_many_that_are_gone_are_one_look_and_one_warning(
    own: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(create_app(own)) as client:
        client.post("/checkpoints/other/activate")
    kept = json.loads((own.checkpoints / NAME).read_text())
    (own.checkpoints / NAME).write_text(json.dumps(kept | {"loaded": [f"n{i}@1" for i in range(9000)] + ["other@1"]}))
    looks: list[Path] = []
    real = folders.list_checkpoints
    monkeypatch.setattr(folders, "list_checkpoints", lambda root: (looks.append(root), real(root))[1])
    caplog.clear()
    with TestClient(create_app(own)) as client:
        assert state(client) == ("other@1", {"other@1"})
    assert len(looks) < 10
    assert (
        len([one for one in caplog.records if "not there any more" in one.message and "8995 more" in one.message]) == 1
    )


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"model": "tiny"}', '{"model": "tiny", "active": 1, "loaded": 2, "meant": 3}']
)
def test_a_damaged_file_is_as_good_as_none(own: Settings, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    (own.checkpoints / NAME).write_text(damage)
    with TestClient(create_app(own)) as client:
        assert state(client)[0] == "demo@2"
    assert "cannot be read" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(own: Settings, caplog: pytest.LogCaptureFixture) -> None:
    (own.checkpoints / NAME).mkdir()
    with TestClient(create_app(own)) as client:
        assert client.post("/checkpoints/other/activate").status_code == 200
        assert state(client)[0] == "other@1"
    assert "will not be restored" in caplog.text


def test_what_is_wrong_with_a_folder_is_found_once(
    registry: Registry, put: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = put("1") / "steering.safetensors"
    sound = tensors.read_bytes()
    tensors.write_bytes(b"?")
    read: list[Path] = []
    real = folders.load
    monkeypatch.setattr(folders, "load", lambda folder: (read.append(folder), real(folder))[1])
    problems = {registry.entries()[0].problem for _ in range(3)}
    with pytest.raises(UnusableCheckpoint):
        registry.load("mine")
    assert len(read) == len(problems) == 1
    replaced = tensors.with_name("new")  # the same size and time: another file nevertheless
    replaced.write_bytes(b"!")
    os.utime(replaced, ns=(tensors.stat().st_mtime_ns,) * 2)
    replaced.replace(tensors)
    assert registry.entries()[0].problem
    assert len(read) == 2
    tensors.write_bytes(sound)
    assert registry.entries()[0].problem is None


def test_a_list_does_not_wait_for_a_load(
    registry: Registry, put: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    reading, goes_on = threading.Event(), threading.Event()
    read = folders.load

    def slow(folder: Path) -> folders.Checkpoint:
        reading.set()
        assert goes_on.wait(10)
        return read(folder)

    monkeypatch.setattr(folders, "load", slow)
    load = threading.Thread(target=registry.load, args=("mine",))
    load.start()
    assert reading.wait(10)
    (entry,) = registry.entries()
    assert "is being loaded" in str(entry.problem)
    goes_on.set()
    load.join()
    (entry,) = registry.entries()
    assert (entry.loaded, entry.changed, entry.problem) == (True, False, None)
    with registry._lock_of("mine"):
        (entry,) = registry.entries()
    assert (entry.loaded, entry.changed, entry.problem) == (True, False, None), "what serves is known"


def test_of_folders_that_are_gone_nothing_is_kept(registry: Registry, put: Callable[[str], Path]) -> None:
    folder = put("1")
    registry.entries()
    shutil.rmtree(folder)
    registry.entries()
    assert not registry._read_cache


def test_a_version_that_is_being_overwritten_is_waited_for(
    registry: Registry, put: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`save` takes config.json away before it replaces the other files, and puts it back last."""
    folder = put("1")
    staged = (folder / "config.json").rename(folder / f".config.json.{os.getpid()}.tmp")
    os.utime(staged)  # a save writes it anew; `put` copies it with its time
    for reference in ("mine@1", "mine"):
        monkeypatch.setattr("server.registry.PATIENCE", 0.0)
        with pytest.raises(UnusableCheckpoint, match=r"is being written, or was not written to its end; try again"):
            registry.load(reference)
        monkeypatch.setattr("server.registry.PATIENCE", 10.0)
    threading.Timer(0.05, lambda: staged.rename(folder / "config.json")).start()
    assert registry.load("mine@1").version == "1"


def test_what_a_save_that_was_killed_has_left_is_not_waited_for(
    registry: Registry, put: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("1")
    folder = put("2")
    left = (folder / "config.json").rename(folder / f".config.json.{os.getpid()}.tmp")
    os.utime(left, (left.stat().st_mtime - 2 * folders.LONGEST_SAVE,) * 2)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(UnusableCheckpoint, match="was not written to its end"):
        registry.load("mine@2")
    assert registry.load("mine").version == "1"
    assert not slept
    registry.unload("mine")
    os.utime(left)
    assert registry.load("mine").version == "1"
    assert slept, "it may be complete in a moment"


def test_files_that_are_replaced_while_they_are_read_are_read_again(
    registry: Registry, put: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = put("1"), put("2")
    real, first = folders.load, [True]

    def replaced_meanwhile(read: Path) -> Any:
        if not first:
            return real(read)
        first.clear()
        shutil.copy(other / "steering.safetensors", folder)  # config.json has been read before
        try:
            return real(read)
        finally:
            shutil.copy(other / "config.json", folder)

    monkeypatch.setattr(folders, "load", replaced_meanwhile)
    assert registry.load("mine@1").sha256 == real(other).config.sha256


def test_each_change_is_told_before_the_next_one(registry: Registry, put: Callable[[str], Path]) -> None:
    """So the last state that is written is the last one there was."""
    put("1")
    put("2")
    told: list[str | None] = []

    def on_change() -> None:
        active = registry.state("tiny").active
        time.sleep(0.001)  # a slow disk
        told.append(active)

    registry.on_change = on_change
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: registry.reload("mine", "12"[i % 2], activate=True), range(32)))
    assert len(told) == 32
    assert told[-1] == registry.state("tiny").active


def test_many_who_activate_at_once_leave_what_is_active_in_the_file(own: Settings) -> None:
    with TestClient(create_app(own)) as client:
        with ThreadPoolExecutor(16) as pool:
            names = ("demo", "other") * 8
            answers = list(pool.map(lambda name: client.post(f"/checkpoints/{name}/activate"), names))
        assert {answer.status_code for answer in answers} == {200}
        assert read_state(own.checkpoints, "tiny").active == state(client)[0]
    assert not list(own.checkpoints.glob(".served.[0-9]*")), "no drafts are left"


@pytest.mark.parametrize("kind", ["deep", "pipe", "folder", "huge"])
def test_a_strange_state_file_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    path = tmp_path / NAME
    if kind == "deep":
        path.write_text("[" * 100_000)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    assert read_state(tmp_path, "tiny").loaded == ()
    assert "cannot be read, and is passed over" in caplog.text
