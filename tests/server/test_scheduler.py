"""Which tokens are computed when, and that every row comes to its end."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.kv_cache import KVCache
from server.engine.scheduler import Scheduler
from server.engine.tape import Tape, Work
from server.engine.types import Row, Sampling


def tape(request: str, index: int = 0, tokens: tuple[int, ...] = (1, 2, 3), new: int = 1) -> Tape:
    return Tape.of(Row(request, index, tokens, Sampling(max_new_tokens=new)))


def build(*, largest: int = 64, roots: int = 4, max_rows: int = 4, step_tokens: int = 16) -> Scheduler:
    return Scheduler(KVCache(largest, roots), max_rows=max_rows, step_tokens=step_tokens)


def make(scheduler: Scheduler, works: tuple[Work, ...], token: int = 7) -> None:
    """Does the works as an engine would; a row ends with its last token."""
    for work in works:
        scheduler.done(work, [0] * len(work))
        if work.draws:
            work.tape.tokens.append(token)
            row = work.tape.row
            assert row is not None
            if len(work.tape.tokens) - work.tape.prompt >= row.sampling.max_new_tokens:
                scheduler.finish(work.tape)


def spans(works: tuple[Work, ...]) -> list[tuple[str, int, int]]:
    return sorted((work.tape.row.request, work.start, work.stop) for work in works if work.tape.row)


def test_rows_join_and_leave_at_any_step() -> None:
    scheduler = build()
    scheduler.add([tape("a", new=3)])
    works = scheduler.next()
    assert spans(works) == [("a", 0, 3)]
    make(scheduler, works)
    scheduler.add([tape("b", tokens=(4, 5), new=1)])
    works = scheduler.next()
    assert spans(works) == [("a", 3, 4), ("b", 0, 2)]
    make(scheduler, works)
    assert spans(scheduler.next()) == [("a", 4, 5)]


def test_a_long_prompt_is_read_in_chunks_beside_rows_that_generate() -> None:
    scheduler = build(step_tokens=8)
    scheduler.add([tape("a", new=20)])
    make(scheduler, scheduler.next())
    scheduler.add([tape("b", tokens=tuple(range(10, 30)))])
    seen = []
    for _ in range(4):
        works = scheduler.next()
        seen.append(spans(works))
        make(scheduler, works)
    assert seen[0] == [("a", 3, 4), ("b", 0, 7)]
    assert [entry for step in seen for entry in step if entry[0] == "b"] == [("b", 0, 7), ("b", 7, 14), ("b", 14, 20)]
    assert all(any(entry[0] == "a" for entry in step) for step in seen), "nobody is stalled"


def test_short_prompts_do_not_wait_for_a_long_one_that_came_before() -> None:
    scheduler = build(step_tokens=16)
    scheduler.add([tape("long", tokens=tuple(range(40)))])
    assert spans(scheduler.next()) == [("long", 0, 16)]
    make(scheduler, scheduler.next())
    scheduler.add([tape("a", tokens=(50, 51, 52)), tape("b", tokens=(60, 61, 62, 63)), tape("c", tokens=(70, 71))])
    works = scheduler.next()
    assert spans(works) == [("a", 0, 3), ("b", 0, 4), ("long", 16, 25)], "half, and what no other prompt fits into"
    make(scheduler, works)
    assert spans(scheduler.next()) == [("c", 0, 1), ("long", 25, 40)], "what fits comes whole, in its turn"


def test_what_has_been_computed_before_is_not_counted_against_a_prompt_that_passes() -> None:
    scheduler = build(step_tokens=16)
    chat = tuple(range(100, 130))
    scheduler.add([tape("before", tokens=chat)])
    while not scheduler.idle:
        make(scheduler, scheduler.next())
    scheduler.add([tape("long", tokens=tuple(range(40)))])
    make(scheduler, scheduler.next())
    scheduler.add([tape("again", tokens=(*chat, 5, 6, 7))])
    assert spans(scheduler.next()) == [("again", 30, 33), ("long", 16, 29)]


def test_a_long_prompt_has_half_of_every_step_however_many_short_ones_come() -> None:
    scheduler = build(step_tokens=16, max_rows=8)
    scheduler.add([tape("long", tokens=tuple(range(64)))])
    number, steps = 100, 0
    while any(one.row and one.row.request == "long" for one in scheduler.running) or steps == 0:
        works = scheduler.next()
        mine = sum(len(work) for work in works if work.tape.row and work.tape.row.request == "long")
        assert mine >= 8
        make(scheduler, works)
        scheduler.add([tape(f"short-{number + i}", tokens=(number + i, 1, 2, 3)) for i in range(8)])
        number, steps = number + 8, steps + 1
    assert steps <= 8


def test_long_prompts_are_read_one_after_the_other() -> None:
    scheduler = build(step_tokens=16)
    scheduler.add([tape("a", tokens=tuple(range(40))), tape("b", tokens=tuple(range(100, 140)))])
    seen = []
    for _ in range(5):
        works = scheduler.next()
        seen.append(spans(works))
        make(scheduler, works)
    assert seen == [
        [("a", 0, 16)],
        [("a", 16, 32)],
        [("a", 32, 40), ("b", 0, 8)],
        [("b", 8, 24)],
        [("b", 24, 40)],
    ]


def test_a_row_waits_for_a_neighbour_that_computes_the_same_prompt() -> None:
    """The two arms of a comparison: the prompt is computed once, its last token for each."""
    scheduler = build()
    prompt = tuple(range(10))
    scheduler.add([tape("a", 0, prompt, new=4), tape("a", 1, prompt, new=4)])
    first = scheduler.next()
    assert spans(first) == [("a", 0, 10)]
    make(scheduler, first)
    assert spans(scheduler.next()) == [("a", 9, 10), ("a", 10, 11)]


def test_a_row_does_not_wait_for_a_few_common_tokens() -> None:
    scheduler = build(step_tokens=32)
    scheduler.add([tape("a", tokens=(1, 2, 3, 4, 5)), tape("b", tokens=(1, 2, 9, 9, 9))])
    assert spans(scheduler.next()) == [("a", 0, 5), ("b", 0, 5)]


def test_when_the_cache_is_full_the_youngest_gives_way_and_goes_on_later() -> None:
    scheduler = build(largest=32, roots=1, step_tokens=32)
    old, young = tape("old", tokens=(1,) * 14, new=18), tape("young", tokens=(2,) * 14, new=1)
    scheduler.add([old])
    make(scheduler, scheduler.next())
    assert old.extent is not None
    scheduler._cache.close(old)
    scheduler._cache.open(old, 16)  # as if it had been given little space
    scheduler.add([young])
    ran: list[str] = []
    for _ in range(60):
        works = scheduler.next()
        scheduler._cache.check()
        ran += [name for name, _, _ in spans(works)]
        make(scheduler, works)
        if scheduler.idle:
            break
    assert scheduler.idle
    assert ran.count("young") == 1


def test_a_step_can_be_foreseen_as_long_as_nothing_else_is_due() -> None:
    scheduler = build(max_rows=2, step_tokens=8)
    scheduler.add([tape("a", new=3), tape("b", tokens=(4, 5, 6), new=6)])
    works = scheduler.next()
    following = scheduler.ahead(works)
    assert spans(following) == [("a", 3, 4), ("b", 3, 4)]
    make(scheduler, works)
    assert spans(scheduler.next()) == spans(following)
    scheduler.add([tape("c", tokens=(8, 9))])
    assert spans(scheduler.ahead(following)) == [("a", 4, 5), ("b", 4, 5)]
    make(scheduler, following)
    works = scheduler.next()
    assert not scheduler.ahead(works), "one ends, and somebody waits for its place"


def test_what_is_to_be_known_of_a_token_is_waited_for() -> None:
    for rules in ({"logprobs": 0}, {"repetition_penalty": 1.1}, {"trace": True}):
        scheduler = build()
        more = {name: rules.pop(name) for name in list(rules) if name == "trace"}
        scheduler.add([Tape.of(Row("a", 0, (1, 2, 3), Sampling(max_new_tokens=9, **rules), **more))])
        assert not scheduler.ahead(scheduler.next())


def test_a_row_that_outgrows_its_space_is_waited_for() -> None:
    scheduler = build(largest=1024, roots=1, max_rows=2)
    scheduler.add([tape("a", new=600)])
    sizes, waited = set(), 0
    while works := scheduler.next():
        (work,) = works
        assert work.tape.extent is not None
        sizes.add(work.tape.extent.size)
        waited += not scheduler.ahead(works)
        make(scheduler, works)
    assert sizes == {512, 1024}
    assert waited == 2, "before it grows, and before it ends"


def test_a_dropped_request_is_gone_wherever_it_was() -> None:
    scheduler = build(max_rows=2)
    scheduler.add([tape("a"), tape("b", tokens=(7, 8), new=5), tape("a", 1)])
    make(scheduler, scheduler.next())
    dropped = scheduler.drop("a")
    assert [one.row.index for one in dropped if one.row] == [1]
    assert spans(scheduler.next()) == [("b", 2, 3)]
    scheduler.drop("b")
    assert scheduler.idle
    scheduler._cache.check()


def test_nobody_is_admitted_while_somebody_waits_for_space() -> None:
    scheduler = build()
    scheduler.add([tape("a")])
    scheduler.hold = True
    assert scheduler.next() == ()
    scheduler.hold = False
    assert len(scheduler.next()) == 1


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    largest=st.sampled_from([32, 48, 64]),
    roots=st.integers(1, 4),
    max_rows=st.integers(2, 8),
    step_tokens=st.integers(8, 40),
)
def test_every_row_ends_with_all_its_tokens_and_the_cache_stays_sound(
    seed: int, largest: int, roots: int, max_rows: int, step_tokens: int
) -> None:
    """Random submits, steps and cancellations of texts that share beginnings, in a cache that is often too small."""
    number = random.Random(seed)
    scheduler = build(largest=largest, roots=roots, max_rows=max_rows, step_tokens=step_tokens)
    cache = scheduler._cache
    stem = tuple(number.randrange(5) for _ in range(20))
    sent: list[Tape] = []
    cancelled: set[str] = set()
    foreseen: list[tuple[str, int, int]] = []
    for _ in range(400):
        came = len(sent), len(cancelled)
        if len(sent) < 12 and number.random() < 0.4:
            own = tuple(number.randrange(5) for _ in range(number.randint(1, largest - 22)))
            prompt = (stem[: number.randint(0, 20)] + own)[: largest - 1]
            new = number.randint(1, largest - len(prompt))
            sent.append(tape(f"r{len(sent)}", 0, prompt, new))
            scheduler.add([sent[-1]])
        if sent and number.random() < 0.05:
            victim = f"r{number.randrange(len(sent))}"
            if scheduler.drop(victim):
                cancelled.add(victim)
        works = scheduler.next()
        cache.check()
        assert sum(map(len, works)) <= step_tokens
        assert len(scheduler.running) <= max_rows
        assert works or scheduler.idle, "somebody waits for ever"
        assert len({work.tape for work in works}) == len(works)
        if foreseen and came == (len(sent), len(cancelled)):
            assert spans(works) == foreseen, "what was begun is not what is due"
        foreseen = spans(scheduler.ahead(works))
        make(scheduler, works, token=number.randrange(5))
        cache.check()
        if len(sent) == 12 and scheduler.idle:
            break
    assert scheduler.idle
    for one in sent:
        assert one.row is not None
        whole = len(one.row.tokens) + one.row.sampling.max_new_tokens
        assert len(one.tokens) == whole or one.row.request in cancelled
