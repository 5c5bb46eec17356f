"""Work between two steps."""

from server.engine.calls import Answer, Call, Calls
from server.engine.types import Job


def test_a_job_for_which_nobody_waits_any_more_ends_between_two_parts() -> None:
    parts = []

    def endless() -> Job[int]:
        try:
            while True:
                parts.append("part")
                yield False
        finally:
            parts.append("closed")

    def short() -> Job[int]:
        yield False
        return 3

    calls, first, second = Calls(), Answer[int](), Answer[int]()
    calls.add(Call(endless(), first))
    calls.add(Call(short(), second))
    for _ in range(3):
        calls.advance()
    assert first.running()
    assert not first.cancel(), "it has begun"
    while calls:
        calls.advance()
    assert parts == ["part", "part", "part", "closed"]
    assert first.exception() is not None
    assert second.result() == 3


def test_a_job_in_one_part_is_done_once_it_has_begun() -> None:
    answer = Answer[int]()

    def whole() -> Job[int]:
        answer.cancel()
        yield from ()
        return 3

    calls = Calls()
    calls.add(Call(whole(), answer))
    assert not calls.advance()
    assert answer.result() == 3
    assert not calls
