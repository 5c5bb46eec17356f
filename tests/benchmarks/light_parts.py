"""Parts for the process that runs parts: what can become of one."""

import os
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.worker import Options, Skipped


class World:
    def __init__(self, options: Options) -> None:
        self.asked = 0

    def described(self) -> dict[str, Any]:
        return {"process": os.getpid()}


class Lacking(World):
    def described(self) -> dict[str, Any]:
        import no_such_package  # type: ignore[import-not-found]

        return {"version": no_such_package}


def count(world: World) -> Iterator[Figure]:
    """How often this process was asked."""
    world.asked += 1
    yield Figure("asked", world.asked)


def crash(world: World) -> Iterator[Figure]:
    yield Figure("before", 1)
    os.abort()


def hang(world: World) -> Iterator[Figure]:
    yield Figure("before", 1)
    time.sleep(600)


def fail(world: World) -> Iterator[Figure]:
    print("seen in the log")
    yield Figure("before", 1)
    raise ValueError("the device is gone\nand more")


def skip(world: World) -> Iterator[Figure]:
    raise Skipped("there is nothing to measure")
    yield


def lacking(world: World) -> Iterator[Figure]:
    import no_such_package  # type: ignore[import-not-found]

    yield no_such_package
