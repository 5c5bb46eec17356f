"""Which tokens are computed when, and that every row comes to its end."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.block_manager import BlockManager
from server.engine.scheduler import Scheduler
from server.engine.sequence import SamplingParams, ScheduledChunk, Sequence, ShareKey, SteeringParams

Chunks = tuple[ScheduledChunk, ...]


def sequence(request_id: str, index: int = 0, tokens: tuple[int, ...] = (1, 2, 3), new: int = 1) -> Sequence:
    return Sequence(request_id, index, tokens, SamplingParams(max_new_tokens=new))


def scored(request_id: str, prompt: tuple[int, ...], continuation: tuple[int, ...], index: int = 0) -> Sequence:
    return Sequence(request_id, index, prompt, continuation=continuation)


def pair(request_id: str, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> list[Sequence]:
    """Two that are scored in lockstep."""
    leader, follower = (scored(request_id, prompt, continuation, index) for index in range(2))
    follower.follow(leader)
    return [leader, follower]


def build(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_num_logits: int = 1000,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_logits=max_num_logits,
    )


def new_tokens(one: Sequence) -> int:
    return len(one.token_ids) - one.num_prompt_tokens


def make(scheduler: Scheduler, chunks: Chunks, token: int = 7) -> None:
    """Does the chunks as an engine would; a sequence ends with its last token."""
    for chunk in chunks:
        one = chunk.sequence
        if not one.block_table:
            continue  # it was cancelled while the step was computed
        scheduler.postprocess(chunk, [0] * len(chunk))
        if chunk.is_sampled:
            one.token_ids.append(token)
        if new_tokens(one) >= one.sampling_params.max_new_tokens or (one.is_scored and not one.num_uncomputed):
            scheduler.finish(one)


def spans(chunks: Chunks) -> list[tuple[str, int, int]]:
    return sorted((chunk.sequence.request_id, chunk.start, chunk.end) for chunk in chunks)


def test_rows_join_and_leave_at_any_step() -> None:
    scheduler = build()
    scheduler.add([sequence("a", new=3)])
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 0, 3)]
    make(scheduler, chunks)
    scheduler.add([sequence("b", tokens=(4, 5), new=1)])
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 3, 4), ("b", 0, 2)]
    make(scheduler, chunks)
    assert spans(scheduler.schedule()) == [("a", 4, 5)]


def test_a_long_prompt_is_read_in_chunks_beside_rows_that_generate() -> None:
    scheduler = build(max_num_batched_tokens=8)
    scheduler.add([sequence("a", new=20)])
    make(scheduler, scheduler.schedule())
    scheduler.add([sequence("b", tokens=tuple(range(10, 30)))])
    seen = []
    for _ in range(4):
        chunks = scheduler.schedule()
        seen.append(spans(chunks))
        make(scheduler, chunks)
    assert seen[0] == [("a", 3, 4), ("b", 0, 7)]
    assert [entry for step in seen for entry in step if entry[0] == "b"] == [("b", 0, 7), ("b", 7, 14), ("b", 14, 20)]
    assert all(any(entry[0] == "a" for entry in step) for step in seen), "nobody is stalled"


def test_short_prompts_do_not_wait_for_a_long_one_that_came_before() -> None:
    scheduler = build(max_num_batched_tokens=16)
    scheduler.add([sequence("long", tokens=tuple(range(40)))])
    assert spans(scheduler.schedule()) == [("long", 0, 16)]
    make(scheduler, scheduler.schedule())
    scheduler.add(
        [sequence("a", tokens=(50, 51, 52)), sequence("b", tokens=(60, 61, 62, 63)), sequence("c", tokens=(70, 71))]
    )
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 0, 3), ("b", 0, 4), ("long", 16, 25)], "half, and what no other prompt fits into"
    make(scheduler, chunks)
    assert spans(scheduler.schedule()) == [("c", 0, 1), ("long", 25, 40)], "what fits comes whole, in its turn"


def test_what_has_been_computed_before_is_not_counted_against_a_prompt_that_passes() -> None:
    scheduler = build(max_num_batched_tokens=16)
    chat = tuple(range(100, 130))
    scheduler.add([sequence("before", tokens=chat)])
    while not scheduler.idle:
        make(scheduler, scheduler.schedule())
    scheduler.add([sequence("long", tokens=tuple(range(40)))])
    make(scheduler, scheduler.schedule())
    scheduler.add([sequence("again", tokens=(*chat, 5, 6, 7))])
    assert spans(scheduler.schedule()) == [("again", 30, 33), ("long", 16, 29)]


def test_a_long_prompt_has_half_of_every_step_however_many_short_ones_come() -> None:
    scheduler = build(max_num_batched_tokens=16, max_num_seqs=8)
    scheduler.add([sequence("long", tokens=tuple(range(64)))])
    number, steps = 100, 0
    while any(one.request_id == "long" for one in scheduler.running) or steps == 0:
        chunks = scheduler.schedule()
        mine = sum(len(chunk) for chunk in chunks if chunk.sequence.request_id == "long")
        assert mine >= 8
        make(scheduler, chunks)
        scheduler.add([sequence(f"short-{number + i}", tokens=(number + i, 1, 2, 3)) for i in range(8)])
        number, steps = number + 8, steps + 1
    assert steps <= 8


def test_long_prompts_are_read_one_after_the_other() -> None:
    scheduler = build(max_num_batched_tokens=16)
    scheduler.add([sequence("a", tokens=tuple(range(40))), sequence("b", tokens=tuple(range(100, 140)))])
    seen = []
    for _ in range(5):
        chunks = scheduler.schedule()
        seen.append(spans(chunks))
        make(scheduler, chunks)
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
    scheduler.add([sequence("a", 0, prompt, new=4), sequence("a", 1, prompt, new=4)])
    first = scheduler.schedule()
    assert spans(first) == [("a", 0, 10)]
    make(scheduler, first)
    assert spans(scheduler.schedule()) == [("a", 9, 10), ("a", 10, 11)]


def test_nobody_waits_for_what_was_computed_and_forgotten() -> None:
    """A neighbour that decodes does not compute its prompt again, however long it goes on."""
    scheduler = build()
    prompt = tuple(range(10))
    scheduler.add([sequence("a", 0, prompt, new=40)])
    make(scheduler, scheduler.schedule())
    scheduler.blocks.reset_prefix_cache()
    scheduler.add([sequence("b", 0, prompt, new=1)])
    assert spans(scheduler.schedule()) == [("a", 10, 11), ("b", 0, 10)]


def test_a_row_does_not_wait_for_a_few_common_tokens() -> None:
    scheduler = build(max_num_batched_tokens=32)
    scheduler.add([sequence("a", tokens=(1, 2, 3, 4, 5)), sequence("b", tokens=(1, 2, 9, 9, 9))])
    assert spans(scheduler.schedule()) == [("a", 0, 5), ("b", 0, 5)]


def test_when_there_is_no_free_block_the_youngest_is_preempted_and_goes_on_later() -> None:
    scheduler = build(num_blocks=8, max_num_batched_tokens=32)
    old, young = sequence("old", tokens=(1,) * 14, new=18), sequence("young", tokens=(2,) * 10, new=3)
    scheduler.add([old, young])
    ran: list[str] = []
    for _ in range(60):
        chunks = scheduler.schedule()
        scheduler.blocks.check(scheduler.running)
        ran += [name for name, _, _ in spans(chunks)]
        make(scheduler, chunks)
        if scheduler.idle:
            break
    assert scheduler.idle
    assert not scheduler.preemptions, "there was room for both"
    young = sequence("young", tokens=(2,) * 10, new=14)
    scheduler.add([sequence("old", tokens=(1,) * 14, new=18), young])
    while not scheduler.idle:
        make(scheduler, scheduler.schedule())
        scheduler.blocks.check(scheduler.running)
    assert scheduler.preemptions
    assert new_tokens(young) == 14


def test_a_step_ahead_is_the_one_that_would_have_been_next() -> None:
    scheduler = build(max_num_seqs=2, max_num_batched_tokens=8)
    scheduler.add([sequence("a", new=3), sequence("b", tokens=(4, 5, 6), new=6)])
    chunks = scheduler.schedule()
    following = scheduler.schedule_ahead(chunks)
    assert spans(following) == [("a", 3, 4), ("b", 3, 4)]
    make(scheduler, chunks)
    scheduler.add([sequence("c", tokens=(8, 9), new=2)])
    chunks, following = following, scheduler.schedule_ahead(following)
    assert spans(following) == [("a", 4, 5), ("b", 4, 5)]
    make(scheduler, chunks)
    chunks, following = following, scheduler.schedule_ahead(following)
    assert spans(following) == [("b", 5, 6), ("c", 0, 2)], "one ends, and somebody waits for its place"
    make(scheduler, chunks)
    assert [one.request_id for one in scheduler.running] == ["b", "c"]
    assert spans(scheduler.schedule_ahead(following)) == [("b", 6, 7), ("c", 2, 3)]


def test_prompts_are_read_in_steps_ahead_and_what_arrives_is_admitted() -> None:
    scheduler = build(num_blocks=200, max_num_batched_tokens=8)
    scheduler.add([sequence("a", new=9), sequence("b", tokens=tuple(range(10, 30)), new=2)])
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 0, 3), ("b", 0, 5)]
    scheduler.add([scored("s", (40, 41), (42, 43)), sequence("c", tokens=(50, 51), new=1)])
    seen = []
    while chunks:
        following = scheduler.schedule_ahead(chunks)
        scheduler.blocks.check(scheduler.running)
        make(scheduler, chunks)
        seen.append(spans(following))
        chunks = following
    assert seen[:4] == [
        [("a", 3, 4), ("b", 5, 9), ("s", 0, 3)],
        [("a", 4, 5), ("b", 9, 14), ("c", 0, 2)],
        [("a", 5, 6), ("b", 14, 20)],
        [("a", 6, 7), ("b", 20, 21)],
    ]
    assert scheduler.idle


@pytest.mark.parametrize(
    "rules",
    [
        {"min_tokens": 5},
        {"logit_bias": ((1, 2.0),)},
        {"stop_token_ids": (1,)},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"frequency_penalty": -0.5},
    ],
)
def test_no_rule_of_sampling_makes_a_step_wait(rules: dict[str, Any]) -> None:
    scheduler = build()
    scheduler.add([Sequence("a", 0, (1, 2, 3), SamplingParams(max_new_tokens=9, **rules), trace=True)])
    assert scheduler.schedule_ahead(scheduler.schedule())


def test_a_step_is_foreseen_also_where_a_sequence_needs_another_block() -> None:
    scheduler = build(num_blocks=160, max_num_seqs=2)
    scheduler.add([sequence("a", new=600)])
    steps, chunks = 0, scheduler.schedule()
    while chunks:
        following = scheduler.schedule_ahead(chunks)
        make(scheduler, chunks)
        scheduler.blocks.check(scheduler.running)
        steps, chunks = steps + 1, following
    assert steps == 600
    assert scheduler.idle


def test_nothing_is_foreseen_where_somebody_would_have_to_be_preempted() -> None:
    scheduler = build(num_blocks=2, block_size=4, max_num_seqs=2)
    scheduler.add([sequence("a", tokens=(1, 2), new=6), sequence("b", tokens=(3, 4), new=6)])
    for _ in range(2):
        make(scheduler, scheduler.schedule())
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 3, 4), ("b", 3, 4)]
    assert not scheduler.schedule_ahead(chunks)


def test_an_aborted_request_is_gone_wherever_it_was() -> None:
    scheduler = build(max_num_seqs=2)
    scheduler.add([sequence("a"), sequence("b", tokens=(7, 8), new=5), sequence("a", 1)])
    make(scheduler, scheduler.schedule())
    aborted = scheduler.abort("a")
    assert [one.index for one in aborted] == [1]
    assert spans(scheduler.schedule()) == [("b", 2, 3)]
    scheduler.abort("b")
    assert scheduler.idle
    scheduler.blocks.check([])


def test_what_is_scored_shares_steps_with_what_is_generated() -> None:
    scheduler = build(max_num_batched_tokens=16)
    scheduler.add([sequence("a", new=9)])
    make(scheduler, scheduler.schedule())
    scheduler.add([scored("s", (5, 6), (7, 8, 9)), scored("long", tuple(range(10, 30)), tuple(range(20)))])
    chunks = scheduler.schedule()
    assert spans(chunks) == [("a", 3, 4), ("long", 0, 11), ("s", 0, 4)]
    assert {chunk.sequence.request_id: chunk.num_logits for chunk in chunks} == {"a": 1, "s": 3, "long": 0}


def test_a_short_score_does_not_wait_behind_a_long_one() -> None:
    scheduler = build(max_num_batched_tokens=16)
    scheduler.add([scored("long", (1,), tuple(range(100)))])
    make(scheduler, scheduler.schedule())
    scheduler.add([scored("short", (5, 6), (7, 8, 9))])
    assert ("short", 0, 4) in spans(scheduler.schedule())


def test_a_long_score_has_half_of_the_logits_of_every_step_however_many_short_ones_come() -> None:
    scheduler = build(max_num_batched_tokens=64, max_num_seqs=8, max_num_logits=8)
    scheduler.add([scored("long", (1,), tuple(range(64)))])
    make(scheduler, scheduler.schedule())
    for number in range(200):
        scheduler.add([scored(f"short-{number}", (100 + number, i), (3, 4), index=i) for i in range(8)])
        chunks = scheduler.schedule()
        assert sum(chunk.num_logits for chunk in chunks if chunk.sequence.request_id == "long") >= 4
        make(scheduler, chunks)
        if not any(one.request_id == "long" for one in scheduler.running):
            return
    raise AssertionError("it never ends")


def test_two_in_lockstep_go_on_in_the_smallest_step_however_many_others_come() -> None:
    scheduler = build(max_num_batched_tokens=2, max_num_seqs=2)
    scheduler.add([sequence("first")])
    while not scheduler.idle:
        make(scheduler, scheduler.schedule())
    scheduler.add(pair("pair", (50,), tuple(range(60, 70))))
    for number in range(12):
        scheduler.add([sequence(f"again-{number}")])  # all but its last token is cached
        make(scheduler, scheduler.schedule())
    assert not any(one.is_scored for one in scheduler.running)


def test_what_is_generated_and_what_is_scored_have_places_of_their_own() -> None:
    scheduler = build(max_num_seqs=2, max_num_batched_tokens=64)
    scheduler.add([scored("s", (i, 2), (3, 4), index=i) for i in range(10)])
    scheduler.add([sequence("a", tokens=(50, 51), new=9)])
    chunks = scheduler.schedule()
    assert [name for name, _, _ in spans(chunks)] == ["a", "s", "s"]


def test_logits_for_scores_are_bounded() -> None:
    scheduler = build(max_num_batched_tokens=64, max_num_logits=6)
    scheduler.add([scored("s", (1, 2, 3), tuple(range(10, 30)))])
    seen = []
    while chunks := scheduler.schedule():
        seen.append((spans(chunks), sum(chunk.num_logits for chunk in chunks)))
        make(scheduler, chunks)
    assert [count for _, count in seen] == [6, 6, 6, 2]
    assert seen[0][0] == [("s", 0, 8)]


def test_those_in_lockstep_are_computed_in_the_same_steps_whatever_is_known_of_them() -> None:
    scheduler = build(max_num_batched_tokens=8)
    before = sequence("before", tokens=tuple(range(6)))
    scheduler.add([before])
    while not scheduler.idle:
        make(scheduler, scheduler.schedule())
    leader, follower = pair("pair", tuple(range(12)), tuple(range(50, 70)))
    # Steered at its prompt, it finds nothing of what the other one finds.
    follower.steering_params = SteeringParams(positions="all")
    scheduler.add([leader, follower])
    steps = []
    while chunks := scheduler.schedule():
        assert sum(map(len, chunks)) <= 8
        scored_now = {
            chunk.sequence.index: (chunk.end - chunk.num_logits, chunk.end) for chunk in chunks if chunk.num_logits
        }
        assert len(set(scored_now.values())) <= 1, "not the same tokens"
        assert len(scored_now) in (0, 2)
        steps.append(len(scored_now))
        make(scheduler, chunks)
        scheduler.blocks.check(scheduler.running)
    assert steps.count(2) == 5
    assert leader.num_computed_tokens == follower.num_computed_tokens == 0
    assert scheduler.idle


def tokens_of(chunks: Chunks, name: str) -> int:
    return sum(len(chunk) for chunk in chunks if chunk.sequence.request_id == name)


def test_a_request_of_one_row_takes_the_place_of_one_of_many_at_once() -> None:
    scheduler = build(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=16)
    many = [sequence("many", i, (10 + i, 2, 3), new=30) for i in range(40)]
    scheduler.add(many)
    for _ in range(5):
        make(scheduler, scheduler.schedule())
    oldest = scheduler.running[:3]
    few = sequence("few", tokens=(90, 91), new=3)
    scheduler.add([few])
    for _ in range(3):
        chunks = scheduler.schedule()
        assert few in {chunk.sequence for chunk in chunks}
        assert set(oldest) < {chunk.sequence for chunk in chunks}, "the others go on"
        assert len(scheduler.running) == 4
        make(scheduler, chunks)
        scheduler.blocks.check(scheduler.running)
    assert scheduler.preemptions == 1
    while not scheduler.idle:
        make(scheduler, scheduler.schedule())
    assert all(new_tokens(one) == 30 for one in many)


def test_nobody_gives_a_place_who_has_one() -> None:
    scheduler = build(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=16)
    scheduler.add([sequence(f"r{i}", tokens=(10 + i, 2, 3), new=30) for i in range(4)])
    make(scheduler, scheduler.schedule())
    scheduler.add([sequence("late", tokens=(90, 91), new=3)])
    for _ in range(28):
        assert "late" not in {name for name, _, _ in spans(scheduler.schedule())}
        make(scheduler, scheduler.schedule())
    assert not scheduler.preemptions


def test_two_requests_of_many_rows_have_the_same_whichever_came_first() -> None:
    scheduler = build(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=32)
    scheduler.add([sequence("first", i, (i, 2, 3), new=10) for i in range(200)])
    for _ in range(5):
        make(scheduler, scheduler.schedule())
    scheduler.add([sequence("second", i, (500 + i, 2, 3), new=10) for i in range(200)])
    had = {"first": 0, "second": 0}
    for _ in range(150):
        chunks = scheduler.schedule()
        for name in had:
            had[name] += tokens_of(chunks, name)
        make(scheduler, chunks)
    assert abs(had["first"] - had["second"]) < 0.1 * sum(had.values()), had


def test_a_text_does_not_wait_for_all_that_is_to_be_scored() -> None:
    scheduler = build(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=32)
    for request in range(4):
        scheduler.add([scored(f"s{request}", (request, i), (7, 8, 9), index=i) for i in range(128)])
    for _ in range(3):
        make(scheduler, scheduler.schedule())
    scheduler.add([sequence("text", tokens=(90, 91, 92))])
    steps = 0
    while any(one.request_id == "text" for one in [*scheduler.waiting, *scheduler.running]):
        make(scheduler, scheduler.schedule())
        steps += 1
    assert steps <= 2


def test_all_comparisons_of_a_request_have_one_share() -> None:
    scheduler = build(num_blocks=400, max_num_seqs=16, max_num_batched_tokens=16)
    for number in range(60):
        compared = pair(f"compare-{number}", (number, 1), (7, 8, 9))
        for one in compared:
            one.share = ShareKey("arms", "arms")
        scheduler.add(compared)
    make(scheduler, scheduler.schedule())
    scheduler.add([sequence("text", tokens=(90, 91, 92))])
    for _ in range(5):  # those that run already go on
        make(scheduler, scheduler.schedule())
    assert "text" not in {one.request_id for one in [*scheduler.waiting, *scheduler.running]}
    assert len(scheduler.waiting) > 60


def test_new_requests_do_not_pass_an_old_one_for_ever() -> None:
    """The queue is full of them all the while: the request of many rows has its share, and ends nevertheless."""
    scheduler = build(num_blocks=400, max_num_seqs=4, max_num_batched_tokens=8)
    scheduler.add([sequence("many", i, (i, 2, 3), new=8) for i in range(20)])
    number = 0
    for _ in range(1500):
        while len({one.request_id for one in scheduler.waiting}) < 6:
            scheduler.add([sequence(f"new-{number}", tokens=(100 + number, 5), new=4)])
            number += 1
        make(scheduler, scheduler.schedule())
        if not any(one.request_id == "many" for one in [*scheduler.waiting, *scheduler.running]):
            break
    else:
        raise AssertionError("it waits for ever")
    assert number > 150


def test_of_a_request_that_has_ended_nothing_is_kept() -> None:
    scheduler = build(num_blocks=400)
    for number in range(50):
        scheduler.add([sequence(f"r{number}", i, (number, i, 1), new=3) for i in range(3)])
        scheduler.add(pair(f"p{number}", (number, 1), (7, 8, 9)))
        make(scheduler, scheduler.schedule())
        scheduler.abort(f"r{number}" if number % 2 else f"p{number}")
    while not scheduler.idle:
        make(scheduler, scheduler.schedule())
    assert not scheduler._waiting._clients


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(8, 40),
    block_size=st.sampled_from([1, 4, 7]),
    max_num_seqs=st.integers(2, 8),
    max_num_batched_tokens=st.integers(8, 40),
    max_num_logits=st.sampled_from([3, 8, 1000]),
    ahead=st.sampled_from([0.0, 0.8, 1.0]),
)
def test_every_sequence_ends_with_all_its_tokens_and_the_cache_stays_sound(
    seed: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_num_logits: int,
    ahead: float,
) -> None:
    """Random submits, steps and cancellations of texts that share beginnings, generated and scored, alone and in
    lockstep, in a cache that is often too small; some or all steps are begun before the one before has ended."""
    number = random.Random(seed)
    scheduler = build(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_logits=max_num_logits,
    )
    blocks = scheduler.blocks
    longest = min(64, (num_blocks // 2) * block_size)  # two of them fit, as those in lockstep need
    stem = tuple(number.randrange(5) for _ in range(20))
    sent: list[Sequence] = []
    cancelled: set[str] = set()
    following: tuple[ScheduledChunk, ...] = ()
    logits: dict[Sequence, int] = {}
    for _ in range(600):
        if len(sent) < 12 and number.random() < 0.4:
            own = tuple(number.randrange(5) for _ in range(number.randint(1, longest)))
            prompt = (stem[: number.randint(0, 20)] + own)[: longest - 1]
            new, name = number.randint(1, longest - len(prompt)), f"r{len(sent)}"
            given = tuple(number.randrange(5) for _ in range(new))
            kind = number.random()
            if kind < 0.3:
                fresh = [sequence(name, 0, prompt, new)]
            elif kind < 0.6:
                fresh = [sequence(name, index, (*prompt, index)[-longest + 1 :], new) for index in range(3)]
            else:
                fresh = [scored(name, prompt, given)] if kind < 0.8 else pair(name, prompt, given)
            sent += fresh
            scheduler.add(fresh)
        if sent and number.random() < 0.05:
            victim = number.choice(sent).request_id
            if scheduler.abort(victim):
                cancelled.add(victim)
        chunks = following or scheduler.schedule()
        blocks.check(scheduler.running)
        assert sum(map(len, chunks)) <= max_num_batched_tokens
        assert sum(chunk.num_logits for chunk in chunks if chunk.sequence.is_scored) <= max(2, max_num_logits)
        assert sum(not one.is_scored for one in scheduler.running) <= max_num_seqs
        assert chunks or scheduler.idle, "somebody waits for ever"
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            one = chunk.sequence
            if not one.block_table:
                continue  # cancelled since the step was begun
            first = chunk.end - chunk.num_logits
            if one.is_scored and chunk.num_logits:
                if first == one.num_prompt_tokens - 1:
                    logits[one] = 0  # also once more, after it was preempted
                assert logits[one] == first - one.num_prompt_tokens + 1, "a token is left out, or scored twice"
                logits[one] += chunk.num_logits
        following = scheduler.schedule_ahead(chunks) if chunks and number.random() < ahead else ()
        make(scheduler, chunks, token=number.randrange(5))
        blocks.check(scheduler.running)
        if len(sent) >= 12 and scheduler.idle:
            break
    assert scheduler.idle
    for one in sent:
        if one.request_id not in cancelled:
            assert (
                logits[one] == len(one.continuation)
                if one.continuation
                else (new_tokens(one) == one.sampling_params.max_new_tokens)
            )
    assert blocks.num_free_blocks == num_blocks


def keyed(key: str, request: str, index: int = 0, new: int = 50, tokens: tuple[int, ...] = (1, 2, 3)) -> Sequence:
    """A text of a request that came with an API key."""
    return Sequence(request, index, tokens, SamplingParams(max_new_tokens=new), share=ShareKey(f"key {key}", request))


def test_keys_have_equal_shares_however_many_requests_each_sends() -> None:
    scheduler = build(num_blocks=1000, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add([keyed("many", f"m{index}", new=5) for index in range(40)])
    scheduler.add([keyed("few", f"f{index}", new=5) for index in range(8)])
    done: list[str] = []
    while "f7" not in done:
        chunks = scheduler.schedule()
        before = {chunk.sequence for chunk in chunks}
        make(scheduler, chunks)
        done += [one.request_id for one in before if new_tokens(one) == 5]
    many = sum(name.startswith("m") for name in done)
    assert many <= 8 + 4, "as many as the other key's, and what ran beside them"


def test_within_a_key_its_requests_have_equal_shares() -> None:
    scheduler = build(num_blocks=1000, max_num_seqs=2, max_num_batched_tokens=64)
    scheduler.add([keyed("one", "batch", index, new=5) for index in range(20)])
    scheduler.add([keyed("one", "single", new=5)])
    steps = 0
    while True:
        chunks = scheduler.schedule()
        steps += 1
        if any(chunk.sequence.request_id == "single" for chunk in chunks):
            break
        make(scheduler, chunks)
    assert steps <= 6


def test_the_first_text_of_a_key_takes_a_place_of_the_key_that_has_the_most() -> None:
    scheduler = build(num_blocks=1000, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add([keyed("many", f"m{index}") for index in range(6)])
    for _ in range(3):
        make(scheduler, scheduler.schedule())
    assert len({one.share.request for one in scheduler.running}) == 4, "each of them is the only one of its request"
    scheduler.add([keyed("few", "f0")])
    assert "f0" in {name for name, _, _ in spans(scheduler.schedule())}
    assert scheduler.preemptions == 1
    assert "m0" in {one.request_id for one in scheduler.running}, "the oldest goes on"


def test_a_second_request_of_a_key_takes_no_place_of_another_key() -> None:
    scheduler = build(num_blocks=1000, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add([keyed("a", "a0"), *(keyed("b", "b0", index) for index in range(3))])
    make(scheduler, scheduler.schedule())
    scheduler.add([keyed("a", "a1")])
    for _ in range(3):
        make(scheduler, scheduler.schedule())
    assert scheduler.preemptions == 0
    assert not any(one.request_id == "a1" for one in scheduler.running)


def test_of_a_step_ahead_nobody_is_kept_who_could_give_no_place() -> None:
    """One key's requests, each with one text: none of them gives way to another, so the next step may be begun."""
    scheduler = build(num_blocks=1000, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add([keyed("a", f"a{index}") for index in range(6)])
    make(scheduler, scheduler.schedule())
    assert scheduler.schedule_ahead(scheduler.schedule())
