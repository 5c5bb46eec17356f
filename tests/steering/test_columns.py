from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from steering import UNSTEERED, ColumnBank, ColumnError, Gate, Reading, SequenceSteering, Site, SiteKind
from tests.steering.families import column

A, B, C = Site(0, SiteKind.RESIDUAL), Site(1, SiteKind.ATTN_OUTPUT), Site(1, SiteKind.ATTN_HEADS)
WIDTHS = {A: 4, B: 4, C: 6}


def bank(tokens: int = 8, spare: int = 2) -> ColumnBank:
    return ColumnBank(device="cpu", max_tokens=tokens, spare=spare)


def columns(*sites: Site, seed: int = 0):
    return [column(site, WIDTHS[site], seed=seed + i, attribute=f"a{i}") for i, site in enumerate(sites)]


class Bank(RuleBasedStateMachine):
    """Whatever is added, removed, filled and grown, every invariant holds after every step."""

    handles = Bundle("handles")
    multipliers = st.sampled_from([0.0, 1.0, -2.0, 0.25])

    def __init__(self):
        super().__init__()
        self.bank = bank(tokens=3, spare=1)
        self.live = []
        self.addresses, self.version = self.pointers(), 0

    @rule(
        target=handles, sites=st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=4), seed=st.integers(0, 99),
        reads=st.sampled_from([None, Reading(A), Reading(A, latched=True)]),
    )  # fmt: skip
    def add(self, sites, seed, reads):
        made = [replace(one, reads=reads) if one.site == B else one for one in columns(*sites, seed=seed)]
        handle = self.bank.add(made)
        assert [site for site, _ in handle.slots] == sites
        self.live.append(handle)
        return handle

    @rule(handle=consumes(handles))
    def remove(self, handle):
        self.bank.remove(handle)
        self.live.remove(handle)
        with pytest.raises(ColumnError, match="removed"):
            self.bank.remove(handle)

    @rule(data=st.data())
    def fill(self, data):
        rows = data.draw(st.lists(self.rows(), max_size=4))
        tokens = data.draw(st.lists(st.integers(-1, len(rows) - 1), max_size=self.bank.max_tokens))
        lines = data.draw(st.none() | st.integers(0, 300))
        given = None if lines is None else np.array([[lines] * len(tokens), [0] * len(tokens)])
        self.bank.fill(rows, tokens, given)
        assert self.bank.filled == len(tokens)
        latched = [self.bank.columns(handle)[i] for row in rows for handle, values in row.parts
                   for i, value in enumerate(values) if value]  # fmt: skip
        assert any(map(self.bank.latches, rows)) <= any(one.reads and one.reads.latched for one in latched)
        assert self.bank.active_read_sites <= {one.reads.site for one in latched if one.reads}

    @rule(lines=st.integers(1, 600))
    def reserve_lines(self, lines):
        self.bank.reserve_lines(lines)
        assert self.bank.max_lines > lines

    @rule()
    def clear(self):
        self.bank.clear()

    @rule(more=st.integers(0, 3))
    def reserve(self, more):
        self.bank.reserve(self.bank.max_tokens + more)

    def rows(self):
        if not self.live:
            return st.just(UNSTEERED)
        part = st.sampled_from(self.live).flatmap(
            lambda handle: st.tuples(
                st.just(handle), st.lists(self.multipliers, min_size=len(handle), max_size=len(handle))
            )
        )
        return st.lists(part, max_size=2).map(SequenceSteering.of)

    def pointers(self):
        shared = [self.bank.multipliers, self.bank.owners, self.bank.steered_tokens, self.bank.opened]
        shared += [self.bank.lines, self.bank.latching]
        own = [part for site in self.bank.sites for part in (self.bank.at(site).vectors, self.bank.at(site).kinds)]
        gates = [self.bank.gates_at(site) for site in self.bank.read_sites]
        own += [part for at in gates for part in (at.weights, at.places, at.held) if part.numel()]
        return {(i, tensor.data_ptr(), tensor.shape) for i, tensor in enumerate(shared)}, {t.data_ptr() for t in own}

    @invariant()
    def holds(self):
        self.bank.check()
        assert set(self.bank.sites) == {site for handle in self.live for site, _ in handle.slots}
        reads = [one.reads for handle in self.live for one in self.bank.columns(handle) if one.reads]
        assert set(self.bank.read_sites) == {one.site for one in reads}

    @invariant()
    def addresses_change_with_the_version_only(self):
        shared, own = self.pointers()
        if self.bank.version == self.version:
            assert shared == self.addresses[0]
            assert own <= self.addresses[1]
        self.addresses, self.version = (shared, own), self.bank.version


TestBank = Bank.TestCase
TestBank.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


def test_a_handle_names_its_slots_in_the_order_of_its_columns():
    made = bank()
    given = columns(B, A, B)
    handle = made.add(given)
    assert [site for site, _ in handle.slots] == [B, A, B]
    assert made.columns(handle) == tuple(given)
    assert made.sites == (A, B)


def test_every_token_gets_the_multipliers_of_its_row():
    made = bank()
    handle = made.add(columns(A, A))
    rows = [SequenceSteering.of([(handle, [1.0, 2.0])]), UNSTEERED, SequenceSteering.of([(handle, [0.0, -3.0])])]
    made.fill(rows, [2, 2, -1, 0, 1])
    expected = torch.zeros(8, 4)
    expected[0, 1] = expected[1, 1] = -3
    expected[3, :2] = torch.tensor([1.0, 2.0])
    assert torch.equal(made.at(A).multipliers, expected)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda x: np.array(x).reshape(2, 2)])
def test_the_token_map_may_be_a_list_an_array_or_a_tensor(form):
    made = bank()
    row = SequenceSteering.of([(made.add(columns(A)), [2.0])])
    made.fill([row], form([0, -1, 0, -1]))
    assert made.at(A).multipliers[:, 0].tolist() == [2, 0, 2, 0, 0, 0, 0, 0]


def test_without_a_token_map_each_row_has_one_token():
    made = bank()
    handle = made.add(columns(A))
    made.fill([SequenceSteering.of([(handle, [x])]) for x in (1.0, 2.0, 0.0)])
    assert made.at(A).multipliers[:4, 0].tolist() == [1, 2, 0, 0]
    made.fill([SequenceSteering.of([(handle, [5.0])])])
    assert made.at(A).multipliers[:4, 0].tolist() == [5, 0, 0, 0]


def test_several_checkpoints_act_on_one_row():
    made = bank()
    first, second = made.add(columns(A)), made.add(columns(A, B))
    made.fill([SequenceSteering.of([(first, [1.0]), (second, [2.0, 3.0])])])
    assert made.at(A).multipliers[0, :2].tolist() == [1, 2]
    assert made.at(B).multipliers[0, 0] == 3
    assert made.active_sites == {A, B}


def test_filling_writes_in_place():
    made = bank()
    row = SequenceSteering.of([(made.add(columns(A)), [1.0])])
    address = made.multipliers.data_ptr()
    for tokens in ([0], [0] * 8, [-1, 0]):
        made.fill([row], tokens)
    assert made.multipliers.data_ptr() == address
    assert made.version == 1


def test_filling_with_the_batch_before_costs_nothing():
    made = bank()
    row = SequenceSteering.of([(made.add(columns(A)), [1.0])])
    made.fill([row, row])
    before = made.multipliers._version
    made.fill([row, row])
    assert made.multipliers._version == before


def test_a_checkpoint_that_fits_the_spare_columns_moves_nothing():
    made = bank(spare=2)
    made.add(columns(A, A))
    version, address = made.version, made.at(A).vectors.data_ptr()
    made.add(columns(A, A))
    assert (made.version, made.at(A).vectors.data_ptr()) == (version, address)
    made.add(columns(A))
    assert made.version == version + 1


@pytest.mark.parametrize("reads", [None, Reading(A)], ids=["here", "elsewhere"])
def test_however_many_checkpoints_come_a_site_grows_few_times(reads):
    """Graphs are captured anew whenever one does."""
    made, versions = bank(), set()
    for _ in range(32):
        made.add([column(B, WIDTHS[B], seed=seed, reads=reads) for seed in range(10)])
        versions.add(made.version)
    assert len(versions) <= 6
    made.check()


def test_growing_keeps_the_current_batch():
    made = bank(spare=0)
    handle = made.add(columns(A))
    made.fill([SequenceSteering.of([(handle, [2.0])])] * 3)
    made.add(columns(A, B, B))
    made.reserve(20)
    assert made.at(A).multipliers[:4].tolist() == [[2, 0]] * 3 + [[0, 0]]
    assert made.at(A).multipliers.shape == (20, 2)
    made.check()


def test_a_removed_handle_steers_nothing_and_its_slot_can_be_used_again():
    made = bank()
    old, other = made.add(columns(A)), made.add(columns(A, seed=5))
    row = SequenceSteering.of([(old, [2.0]), (other, [3.0])])
    made.fill([row])
    made.remove(old)
    assert made.at(A).multipliers[0, :2].tolist() == [0, 3]
    new = made.add(columns(A, seed=9))
    assert new.slots == old.slots
    assert made.at(A).multipliers[0, :2].tolist() == [0, 3]
    with pytest.raises(ColumnError, match="removed"):
        made.fill([row])
    made.check()


def test_a_site_whose_last_column_goes_is_no_site_any_more():
    made = bank()
    handle, _ = made.add(columns(A, A)), made.add(columns(B))
    made.remove(handle)
    assert made.sites == (B,)


def test_a_handle_of_another_bank_is_refused():
    mine, other = bank(), bank()
    handle = other.add(columns(A))
    mine.add(columns(A))
    with pytest.raises(ColumnError, match="another bank"):
        mine.fill([SequenceSteering.of([(handle, [1.0])])])
    with pytest.raises(ColumnError, match="another bank"):
        mine.columns(handle)


@pytest.mark.parametrize(
    ("tokens", "named"),
    [([2], "not 2 to 2"), ([-2], "not -2"), ([0] * 9, "9 tokens"), ([0.5], "whole"), ([True], "whole")],
)
def test_a_token_map_that_does_not_fit_is_refused_and_changes_nothing(tokens, named):
    made = bank()
    row = SequenceSteering.of([(made.add(columns(A)), [1.0])])
    made.fill([row, row], [0, 1])
    with pytest.raises(ColumnError, match=named):
        made.fill([row, row], tokens)
    assert made.filled == 2
    made.check()


def test_columns_of_another_width_are_refused_and_nothing_is_added():
    made = bank()
    made.add(columns(A))
    with pytest.raises(ColumnError, match=r"width 7, but site 0\.residual has width 4"):
        made.add([*columns(B), column(A, 7)])
    assert made.sites == (A,)
    made.check()


def test_no_columns_are_no_handle():
    with pytest.raises(ColumnError, match="at least one"):
        bank().add([])


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"max_tokens": 4, "spare": -1}])
def test_a_bank_for_nothing_is_refused(settings):
    with pytest.raises(ColumnError, match="max_tokens"):
        ColumnBank(device="cpu", **settings)


def test_more_different_rows_than_were_foreseen_are_served():
    made = bank(tokens=1000)
    handle = made.add(columns(A))
    for start in (0, 600, 1200):
        made.fill([SequenceSteering.of([(handle, [float(start + i + 1)])]) for i in range(600)])
        assert made.at(A).multipliers[:601, 0].tolist() == [*(float(start + i + 1) for i in range(600)), 0.0]
    made.check()


def test_counts_are_taken_once():
    made = bank()
    made.steered_tokens[:2] = 3
    assert made.take_counts(3).tolist() == [3, 3, 0]
    assert made.take_counts().tolist() == [0] * 8


def test_a_bank_made_in_inference_mode_works_outside_and_the_other_way_round():
    with torch.inference_mode():
        made = bank(spare=0)
        handle = made.add(columns(A))
    made.fill([SequenceSteering.of([(handle, [1.0])])])
    with torch.inference_mode():
        made.add(columns(A))
        made.fill([SequenceSteering.of([(handle, [2.0])])])
    made.fill([SequenceSteering.of([(handle, [3.0])])])
    assert made.at(A).multipliers[0, 0] == 3
    made.check()


def test_a_free_slot_is_zero_whatever_was_there():
    made = bank()
    made.remove(made.add([column(A, 4, gate=Gate.LINEAR)]))
    buffers = made.at(A)
    assert not any(part.any() for part in (buffers.vectors, buffers.weights, buffers.biases, buffers.kinds))
