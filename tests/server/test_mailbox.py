"""Calls into the event loop arrive in order, all of them, and wake it no more often than needed."""

import asyncio
import logging
import threading

import pytest

from server.ticket import Mailbox


def test_calls_of_one_moment_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    woken = []

    async def story() -> None:
        mailbox, loop = Mailbox(), asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: woken.append(1) or wake(*call))
        for number in range(100):
            mailbox.post(seen.append, number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(woken) == 1
        mailbox.post(seen.append, 100)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(woken) == 2

    asyncio.run(story())
    assert seen == list(range(101))


def test_no_call_of_any_thread_is_lost() -> None:
    seen: list[tuple[int, int]] = []

    async def story() -> None:
        mailbox, done = Mailbox(), asyncio.Event()

        def post(thread: int) -> None:
            for number in range(2000):
                mailbox.post(seen.append, (thread, number))

        threads = [threading.Thread(target=post, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        mailbox.post(done.set)
        await asyncio.wait_for(done.wait(), 10)

    asyncio.run(story())
    for index in range(4):
        assert [number for thread, number in seen if thread == index] == list(range(2000))


def test_a_call_that_fails_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def fail() -> None:
        raise ValueError("this one fails")

    async def story() -> None:
        mailbox = Mailbox()
        mailbox.post(fail)
        mailbox.post(seen.append, 1)
        await asyncio.sleep(0.01)

    with caplog.at_level(logging.ERROR):
        asyncio.run(story())
    assert seen == [1]
    assert "this one fails" in caplog.text


def test_a_closed_loop_is_said_every_time() -> None:
    async def made() -> Mailbox:
        return Mailbox()

    mailbox = asyncio.run(made())
    for _ in range(2):
        with pytest.raises(RuntimeError):
            mailbox.post(print)
