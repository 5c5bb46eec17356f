"""The folder of a server's processes goes with the server, or before the next one."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import shared_folder
from server.shared_folder import SharedFolder

ROOT = Path(__file__).parents[2]
HOLD = "from server.shared_folder import SharedFolder; print(SharedFolder().path, flush=True); input()"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other(temporary: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Another process, which has one, with a file in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"TMPDIR": str(temporary)},
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "group").write_text("file")
    yield process, folder
    process.kill()
    process.communicate()


def test_it_is_of_this_user_alone_and_goes_when_it_is_closed(temporary: Path) -> None:
    with SharedFolder() as folder:
        assert (folder.parent, folder.stat().st_mode & 0o777) == (temporary, 0o700)
        (folder / "metrics").mkdir()
    assert not folder.exists()


def test_that_of_a_killed_process_goes_before_the_next_one(other: tuple["subprocess.Popen[str]", Path]) -> None:
    process, folder = other
    with SharedFolder() as own:
        assert (folder / "group").exists(), "its process lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert folder.exists()
        with SharedFolder():
            assert not folder.exists()
            assert own.exists()


def test_what_is_not_ours_stays(temporary: Path) -> None:
    (temporary / "matsteer-other").mkdir()
    (temporary / f"{shared_folder.PREFIX}file").touch()
    with SharedFolder():
        pass
    assert {path.name for path in temporary.iterdir()} == {"matsteer-other", f"{shared_folder.PREFIX}file"}


def test_many_that_start_at_once_take_none_from_another(temporary: Path) -> None:
    begin, folders = threading.Barrier(8), []

    def start() -> None:
        begin.wait()
        for _ in range(20):
            made = SharedFolder()
            folders.append(made)
            assert made.path.exists()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(folders) == 160
    assert all(made.path.exists() for made in folders)
    for made in folders:
        made.close()
    assert list(temporary.iterdir()) == []


def test_a_file_system_without_locks_is_no_obstacle(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")  # what NFS says of a folder

    monkeypatch.setattr("fcntl.flock", refuse)
    with SharedFolder() as first, SharedFolder() as second:
        assert first.exists()
        assert second.exists()
    assert list(temporary.iterdir()) == []
