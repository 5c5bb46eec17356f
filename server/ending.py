"""The end of a process."""

import logging
import os
from multiprocessing.util import _run_finalizers  # type: ignore[attr-defined]
from typing import NoReturn


def end(status: int) -> NoReturn:
    """This process, at once. Python's own way out takes seconds to free a model on a busy machine, and waits for
    threads, which may wait for a device or for another process, and for locks that they have (tqdm's)."""
    logging.shutdown()
    _run_finalizers(0)  # give back semaphores: multiprocessing complains of those that are left
    os._exit(status)
