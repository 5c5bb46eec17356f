"""The files in which several fronts count together: prometheus_client's multiprocess mode."""

import errno
import os
from pathlib import Path

from server.errors import StartupError

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # read when prometheus_client is imported
KINDS = ("counter", "histogram")  # what server/metrics.py has
RESERVED = 2**20  # bytes of a file, for some thousands of series: what prometheus_client maps at first


def count_together(folder: Path) -> None:
    """Of this process and those that it will start."""
    folder.mkdir()
    os.environ[VARIABLE] = str(folder)


def reserve_files() -> None:
    """Takes the space of this process' files, where several count together. They are mapped into memory: on a disk that
    is full when a new series comes, the system would end the process (SIGBUS). Raises StartupError where it is full
    now."""
    if VARIABLE not in os.environ or not hasattr(os, "posix_fallocate"):
        return
    for kind in KINDS:
        path = Path(os.environ[VARIABLE], f"{kind}_{os.getpid()}.db")
        try:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVED)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # not every file system can do it
                continue
            raise StartupError(f"There is no space for metrics in {path.parent} (TMPDIR): {error.strerror}.") from error
