"""Who runs with whom."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduler import Scheduler
from server.engine.types import Row, Sampling


def row(request: str, index: int = 0, group: int = 0, length: int = 3, new: int = 1) -> Row:
    return Row(request, index, group, (1,) * length, Sampling(max_new_tokens=new))


def test_rows_that_wait_share_the_next_batch() -> None:
    scheduler = Scheduler(max_rows=4, max_tokens=1000)
    for name in "abc":
        scheduler.add([row(name)])
    batch = scheduler.next()
    assert batch is not None
    assert batch.fresh
    assert [r.request for r in batch.rows] == ["a", "b", "c"]


def test_the_arms_of_a_comparison_are_never_split() -> None:
    scheduler = Scheduler(max_rows=3, max_tokens=1000)
    scheduler.add([row("a", 0, 0), row("a", 1, 0), row("a", 2, 1), row("a", 3, 1)])
    batch = scheduler.next()
    assert batch is not None
    assert [r.index for r in batch.rows] == [0, 1]


def test_a_long_prompt_does_not_make_a_batch_too_wide() -> None:
    scheduler = Scheduler(max_rows=8, max_tokens=100)
    scheduler.add([row("a", length=10)])
    scheduler.add([row("b", length=60)])
    batch = scheduler.next()
    assert batch is not None
    assert [r.request for r in batch.rows] == ["a"]


def test_a_long_answer_does_not_make_a_batch_too_wide() -> None:
    scheduler = Scheduler(max_rows=8, max_tokens=100)
    for name, length, new in (("a", 10, 10), ("b", 3, 40), ("c", 3, 1)):
        scheduler.add([row(name, length=length, new=new)])
    batch = scheduler.next()
    assert batch is not None
    assert [r.request for r in batch.rows] == ["a", "b"], "2 x (10 + 40) fits, 3 x (10 + 40) does not"


def test_a_row_larger_than_every_limit_still_runs() -> None:
    scheduler = Scheduler(max_rows=2, max_tokens=10)
    scheduler.add([row("a", i, 0, length=60) for i in range(3)])
    batch = scheduler.next()
    assert batch is not None
    assert len(batch.rows) == 3


def test_a_dropped_request_is_gone_wherever_it_was() -> None:
    scheduler = Scheduler(max_rows=2, max_tokens=1000)
    scheduler.add([row("a"), row("b"), row("a", 1, 1)])
    scheduler.next()
    assert len(scheduler.drop("a")) == 2
    batch = scheduler.next()
    assert batch is not None
    assert [r.request for r in batch.rows] == ["b"]


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.integers(1, 5), max_size=12), st.integers(2, 6), st.integers(5, 40))
def test_every_row_runs_exactly_once(groups: list[int], max_rows: int, max_tokens: int) -> None:
    scheduler = Scheduler(max_rows, max_tokens)
    rows = [row("r", i, group, length=1 + group) for group, size in enumerate(groups) for i in range(size)]
    scheduler.add(rows)
    ran: list[Row] = []
    while batch := scheduler.next():
        assert batch.fresh
        ran += batch.rows
        for one in batch.rows:
            scheduler.finish(one)
    assert ran == rows
    assert scheduler.idle
