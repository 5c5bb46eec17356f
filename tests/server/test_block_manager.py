"""Who holds which blocks, where a prefix is found again, and that no memory is lost."""

import gc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine.block_manager import BlockManager
from server.engine.sequence import PositionsName, Sequence, SteeringParams
from steering.bank import ColumnBank
from steering.types import SequenceSteering
from tests.server.conftest import columns

PROMPT = tuple(range(100, 120))
SIZE = 8
BANK = ColumnBank(device="cpu", max_tokens=1)
HANDLE = BANK.add(columns(8, seed=1))


def steering(multiplier: float, positions: PositionsName = "generated", handle: Any = HANDLE) -> SteeringParams:
    return SteeringParams(SequenceSteering.of([(handle, (multiplier, 0.0, 0.0))]), positions)


def text(tokens: tuple[int, ...], params: SteeringParams | None = None, *, new: tuple[int, ...] = ()) -> Sequence:
    """A prompt, and what has been generated after it."""
    sequence = Sequence("r", 0, tokens, steering_params=params or SteeringParams())
    sequence.token_ids += new
    return sequence


def compute(blocks: BlockManager, sequence: Sequence, stop: int | None = None) -> None:
    """As a step that is done with all tokens, or those up to `stop`."""
    stop = len(sequence.token_ids) if stop is None else stop
    assert blocks.grow_to(sequence, stop)
    blocks.commit(sequence, stop, [0] * (stop - sequence.num_computed_tokens))


def left_behind(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """A sequence that was computed and has ended."""
    assert blocks.allocate(sequence, len(sequence.token_ids))
    compute(blocks, sequence)
    blocks.free(sequence)
    return sequence


def shared(first: Sequence, second: Sequence) -> int:
    """How many tokens of the second are found, after the first has been computed and has ended."""
    blocks = BlockManager(16, SIZE)
    left_behind(blocks, first)
    known = blocks.num_cached(second)
    assert blocks.allocate(second, len(second.token_ids))
    blocks.check([second])
    assert second.num_computed_tokens == known
    return known


def test_a_prompt_is_shared_under_any_steering_but_for_its_last_token() -> None:
    for one, other in ((None, steering(1.0)), (steering(1.0), None), (steering(1.0), steering(-2.0))):
        assert shared(text(PROMPT, one), text(PROMPT, other)) == len(PROMPT) - 1


def test_a_prompt_steered_itself_is_shared_under_the_same_steering_only() -> None:
    for positions in ("prompt", "all"):
        assert shared(*(text(PROMPT, steering(1.0, positions)) for _ in range(2))) == len(PROMPT) - 1
        for other in (None, steering(2.0, positions), steering(1.0)):
            assert shared(text(PROMPT, steering(1.0, positions)), text(PROMPT, other)) == 0
            assert shared(text(PROMPT, other), text(PROMPT, steering(1.0, positions))) == 0


def test_generated_tokens_serve_a_longer_prompt_only_where_nothing_steered_them() -> None:
    new = tuple(range(10))
    longer = (*PROMPT, *new, 1, 2, 3)
    assert shared(text(PROMPT, new=new), text(longer)) == 30
    assert shared(text(PROMPT, new=new), text(longer, steering(1.0))) == 30
    assert shared(text(PROMPT, steering(1.0), new=new), text(longer)) == len(PROMPT) - 1


def test_equal_names_and_numbers_of_another_checkpoint_are_not_the_same_steering() -> None:
    """The same slots and multipliers, but the columns were removed and loaded again."""
    bank = ColumnBank(device="cpu", max_tokens=1)
    handle = bank.add(columns(8, seed=1))
    before = steering(1.0, "all", handle)
    bank.remove(handle)
    after = steering(1.0, "all", bank.add(columns(8, seed=1)))
    assert before.columns.slots == after.columns.slots
    assert shared(text(PROMPT, before), text(PROMPT, after)) == 0


def test_columns_that_are_gone_are_not_kept_for_the_prompts_that_they_steered() -> None:
    bank = ColumnBank(device="cpu", max_tokens=1)
    handle = bank.add(columns(8, seed=1))
    blocks = BlockManager(16, SIZE)
    left_behind(blocks, text(PROMPT, steering(1.0, "all", handle)))
    bank.remove(handle)
    gone = weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None


def test_a_prefix_is_found_to_the_token_also_within_a_block() -> None:
    for common in range(len(PROMPT)):
        other = (*PROMPT[:common], *range(5, 12))
        assert shared(text(PROMPT), text(other)) == common


def test_thirty_two_arms_over_a_long_prompt_take_the_blocks_of_one_prompt_plus_their_own() -> None:
    blocks, prompt = BlockManager(2000, 32), tuple(range(1500))
    arms = [text(prompt, steering(1.0 + i)) for i in range(32)]
    for arm in arms:
        assert blocks.allocate(arm, len(prompt))
        compute(blocks, arm)
        assert blocks.grow_to(arm, len(prompt) + 4)
    blocks.check(arms)
    own = 1  # 1,500 tokens are 46 full blocks and a begun one, in which each arm writes
    assert blocks.num_blocks - blocks.num_free_blocks == 46 + 32 * own
    assert [arm.num_computed_tokens for arm in arms] == [1500] * 32
    assert blocks.cached_tokens == 31 * 1499
    assert len(blocks.pending_copies) == 31, "nothing is copied but the begun block"
    assert {copy.source for copy in blocks.pending_copies} == {arms[0].block_table[46]}, "from one, so all at once"


def test_a_begun_block_that_nobody_holds_is_gone_on_with_and_not_copied() -> None:
    blocks = BlockManager(4, SIZE)
    chat = left_behind(blocks, text(PROMPT, new=(1, 2)))
    longer = text((*PROMPT, 1, 2, 3, 4))
    assert blocks.allocate(longer, len(longer.token_ids))
    assert (longer.num_computed_tokens, blocks.pending_copies) == (len(chat.token_ids), [])
    blocks.check([longer])


def test_the_least_recently_used_content_is_evicted_first_and_empty_blocks_before_it() -> None:
    blocks = BlockManager(6, SIZE)
    first, second = ((start,) * 16 for start in (1, 2))
    left_behind(blocks, text(first))
    left_behind(blocks, text(second))
    again = text((*first, 9))
    assert blocks.allocate(again, 17)
    assert again.num_computed_tokens == 16
    blocks.free(again)  # now it was used last
    assert blocks.allocate(text((5,) * 16), 16)
    assert blocks.num_cached(text((*second, 9))) == 16, "two empty blocks were left"
    assert blocks.allocate(text((6,) * 16), 16)
    assert blocks.num_cached(text((*first, 9))) == 16
    assert blocks.num_cached(text((*second, 9))) == 0


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    blocks = BlockManager(4, SIZE)
    left_behind(blocks, text(tuple(range(32))))
    assert blocks.allocate(text((99,) * 8), 8)
    assert blocks.num_cached(text((*range(32), 5))) == 24


def test_what_is_not_sound_is_never_shared() -> None:
    blocks = BlockManager(3, SIZE)
    broken = text(PROMPT)
    assert blocks.allocate(broken, len(PROMPT))
    compute(blocks, broken)
    blocks.free(broken, keep=False)
    assert blocks.num_cached(text(PROMPT)) == 0
    blocks.check([])


def test_nobody_finds_what_a_sequence_adds_to_a_beginning_that_was_forgotten() -> None:
    """Its later blocks follow something that is not known any more: they must not pass for the beginning of a text."""
    blocks = BlockManager(8, SIZE)
    running, other = text(PROMPT), text((*PROMPT[:16], 7, 8))
    assert blocks.allocate(running, len(PROMPT))
    compute(blocks, running)
    blocks.reset_prefix_cache()
    running.token_ids += range(100, 130)
    compute(blocks, running)
    blocks.check([running])
    for start in range(0, 40, SIZE):
        assert blocks.num_cached(text((*running.token_ids[start : start + 20], 1))) == 0
    assert blocks.num_cached(other) == 0


def test_a_sharer_goes_on_where_what_is_shared_turned_out_unsound() -> None:
    blocks = BlockManager(8, SIZE)
    sound, broken = text((*PROMPT[:16], 1)), text((*PROMPT[:16], 2))
    for sequence in (sound, broken):
        assert blocks.allocate(sequence, 17)
        compute(blocks, sequence)
    common = sound.block_table[:2]
    assert broken.block_table[:2] == common
    blocks.free(broken, keep=False)
    assert blocks.num_cached(text((*PROMPT[:16], 3))) == 0
    blocks.check([sound])


def test_nothing_changes_where_there_is_no_room() -> None:
    blocks = BlockManager(3, SIZE)
    left_behind(blocks, text(PROMPT))
    first = text((*PROMPT[:16], 1))
    assert blocks.allocate(first, 17)
    before = [block.content.copy() for block in blocks._blocks]
    second = text((*PROMPT[:16], 3))
    assert not blocks.allocate(second, 17)
    assert not blocks.grow_to(first, 25)
    assert (second.block_table, second.num_computed_tokens) == ([], 0)
    assert [block.content for block in blocks._blocks] == before
    blocks.check([first])


def test_a_cache_of_nothing_is_refused() -> None:
    for size in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match="at least one block"):
            BlockManager(*size)


class Cache(RuleBasedStateMachine):
    """Random lives of sequences over few tokens, so that many begin alike; beside the blocks a plain memory, in which
    everything is written and copied, says whether what is found is what was computed."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6, 4)
        self.memory: list[list[Any]] = [[None] * 4 for _ in range(6)]
        self.held: list[Sequence] = []

    def flush(self) -> None:
        """Makes the copies, as a step does."""
        for copy in self.blocks.pending_copies:
            self.memory[copy.target] = list(self.memory[copy.source])
        self.blocks.pending_copies.clear()

    def kept(self, sequence: Sequence) -> list[Any]:
        """What lies where its computed tokens should."""
        return [self.memory[sequence.block_table[i // 4]][i % 4] for i in range(sequence.num_computed_tokens)]

    @staticmethod
    def wanted(sequence: Sequence) -> list[Any]:
        """All that a token's keys and values depend on: the tokens up to it, and what steered each of them."""
        params, prompt = sequence.steering_params, sequence.num_prompt_tokens
        steers = params.columns.slots
        marks = [
            (token, steers if params.positions == "all" or (i >= prompt - 1 and steers) else ())
            for i, token in enumerate(sequence.token_ids)
        ]
        return [tuple(marks[: i + 1]) for i in range(len(marks))]

    @rule(
        target=running,
        tokens=st.lists(st.integers(1, 2), min_size=1, max_size=10),
        multiplier=st.sampled_from([0.0, 1.0, 2.0]),
        positions=st.sampled_from(["generated", "all"]),
    )
    def begin(self, tokens: list[int], multiplier: float, positions: PositionsName) -> Any:
        sequence = text(tuple(tokens), steering(multiplier, positions))
        if not self.blocks.allocate(sequence, len(tokens)):
            return None
        assert sequence.num_computed_tokens < len(tokens)
        self.held.append(sequence)
        return sequence

    @rule(sequence=running, count=st.integers(1, 6), token=st.integers(1, 2))
    def go_on(self, sequence: Sequence | None, count: int, token: int) -> None:
        if sequence not in self.held or sequence is None:
            return
        self.flush()
        if not sequence.num_uncomputed:
            sequence.token_ids.append(token)
        start, stop = sequence.num_computed_tokens, min(len(sequence.token_ids), sequence.num_computed_tokens + count)
        if not self.blocks.grow_to(sequence, stop):
            return
        self.flush()
        for index, content in enumerate(self.wanted(sequence)[start:stop], start):
            block = sequence.block_table[index // 4]
            sharers = [one for one in self.held if block in one.block_table]
            assert sharers == [sequence], "what is written to belongs to one sequence"
            self.memory[block][index % 4] = content
        self.blocks.commit(sequence, stop, [0] * (stop - start))

    @rule(sequence=consumes(running), keep=st.booleans())
    def end(self, sequence: Sequence | None, keep: bool) -> None:
        if sequence in self.held and sequence is not None:
            self.held.remove(sequence)
            self.blocks.free(sequence, keep=keep)

    @rule()
    def forget(self) -> None:
        self.blocks.reset_prefix_cache()

    @invariant()
    def what_is_found_is_what_was_computed(self) -> None:
        self.flush()
        self.blocks.check(self.held)
        for sequence in self.held:
            assert self.kept(sequence) == self.wanted(sequence)[: sequence.num_computed_tokens]


Cache.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCache = Cache.TestCase


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_all_blocks_come_back(size: int, lengths: list[int]) -> None:
    blocks = BlockManager(12, size)
    held = []
    for number, length in enumerate(lengths):
        sequence = text((number,) * length)
        if blocks.allocate(sequence, length):
            held.append(sequence)
        blocks.check(held)
    for sequence in held:
        blocks.free(sequence)
    blocks.check([])
    assert blocks.num_free_blocks == 12
