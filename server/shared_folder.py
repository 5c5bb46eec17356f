"""A folder through which the processes of one server find each other."""

import os
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

PREFIX = "matsteer-run-"


class SharedFolder:
    """In TMPDIR, for this user alone, until `close`. This process holds a lock on it, which ends with the process
    however that ends: where it was killed, the next server removes the folder."""

    def __init__(self) -> None:
        _sweep()
        self._lock: int | None = None
        while self._lock is None:  # once more where another server has just taken it for one that nobody holds
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            try:
                self._lock = _lock(self.path)
            except OSError:  # a file system without locks, where nobody sweeps
                break

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        _remove(self.path, self._lock)
        self._lock = None


def _sweep() -> None:
    """Removes those that nobody holds any more."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, no folder, or where there are no locks
            if (lock := _lock(left)) is not None:
                _remove(left, lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds it; None where another process does, or it is gone. Raises OSError."""
    import fcntl  # not on Windows, where no server has several processes

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with ExitStack() as unless_held:
        unless_held.callback(os.close, descriptor)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                unless_held.pop_all()
                return descriptor
    return None


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
