"""Parts for the process that runs parts: what can become of one."""

import os
import sys
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


def lacking_late(world: World) -> Iterator[Figure]:
    yield Figure("before", 1)
    yield from lacking(world)


def lacking_ours(world: World) -> Iterator[Figure]:
    import benchmarks.no_such_module  # type: ignore[import-not-found]

    yield benchmarks.no_such_module


def lacking_inside(world: World) -> Iterator[Figure]:
    import httpx.no_such_module  # type: ignore[import-not-found]

    yield httpx.no_such_module


def broken(world: World) -> Iterator[Figure]:
    """What cannot be read at the other end, and a figure behind it."""

    class Unreadable(Figure):
        def __reduce__(self) -> tuple[Any, ...]:
            return _unreadable, ()

    yield Unreadable("bad", 1)
    yield Figure("behind it", 1)


def _unreadable() -> None:
    raise ValueError("nobody can read this")


def loaded() -> list[str]:
    """In a process of clients: modules."""
    return sorted(sys.modules)
