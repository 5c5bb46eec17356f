"""Calls from other threads into an event loop: all of them, in order, few wake-ups."""

import asyncio
import gc
import threading
from typing import Any
from weakref import ref

import pytest

from server.doorbell import Doorbell


def test_calls_of_many_threads_are_all_made_and_each_thread_keeps_its_order() -> None:
    made: list[tuple[int, int]] = []

    async def main() -> None:
        bell = Doorbell.of(asyncio.get_running_loop())

        def ring(thread: int) -> None:
            for number in range(2000):
                bell.ring(made.append, (thread, number))

        threads = [threading.Thread(target=ring, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while len(made) < 4 * 2000:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 20))
    for thread in range(4):
        assert [number for who, number in made if who == thread] == list(range(2000))


def test_what_is_rung_together_wakes_the_loop_once() -> None:
    async def main() -> tuple[int, list[int]]:
        loop = asyncio.get_running_loop()
        woken, made = 0, []
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        bell = Doorbell.of(loop)
        for number in range(32):
            bell.ring(made.append, number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return woken, made

    assert asyncio.run(main()) == (1, list(range(32)))


def test_a_call_that_rings_again_is_answered() -> None:
    async def main() -> list[int]:
        made: list[int] = []
        bell = Doorbell.of(asyncio.get_running_loop())

        def down(number: int) -> None:
            made.append(number)
            if number:
                bell.ring(down, number - 1)

        bell.ring(down, 3)
        await asyncio.sleep(0.01)
        bell.ring(down, 1)
        await asyncio.sleep(0.01)
        return made

    assert asyncio.run(main()) == [3, 2, 1, 0, 1, 0]


def test_a_call_that_fails_is_told_to_the_loop_and_the_others_are_made() -> None:
    async def main() -> tuple[list[int], list[str]]:
        made: list[int] = []
        told: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(type(context["exception"]).__name__))
        bell = Doorbell.of(loop)
        bell.ring(made.append, 1)
        bell.ring(made.remove, 7)
        bell.ring(made.append, 2)
        await asyncio.sleep(0.01)
        return made, told

    assert asyncio.run(main()) == ([1, 2], ["ValueError"])


def test_a_loop_has_one_bell_which_ends_with_it() -> None:
    async def main() -> Doorbell:
        loop = asyncio.get_running_loop()
        assert Doorbell.of(loop) is Doorbell.of(loop)
        return Doorbell.of(loop)

    bell = asyncio.run(main())
    with pytest.raises(RuntimeError, match="the event loop has ended"):
        bell.ring(print)
    weak = ref(bell)
    del bell
    gc.collect()
    assert weak() is None
