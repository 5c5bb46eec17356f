"""Tensor work that must not leave its threads behind."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def aside(work: Callable[[], T]) -> T:
    """The result of `work`, done on a thread that ends with it.

    OpenMP keeps a team of workers for every thread that has ever computed something in parallel. As soon as there are
    more of them than cores, GNU's runtime stops waiting actively for the next parallel region, and a decoding step,
    which has hundreds, takes twice as long (docs/engine.md). So nothing but the engine's thread may keep a team.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(work).result()
