import math
from dataclasses import replace

import pytest
import torch

from steering import UNSTEERED, Clamp, ColumnError, Gate, Handle, Reading, SequenceSteering, Site, SiteKind
from tests.steering.families import column

HERE, THERE = Site(1, SiteKind.ATTN_OUTPUT), Site(0, SiteKind.RESIDUAL)


def test_a_site_reads_as_it_is_written():
    assert str(Site(14, SiteKind.ATTN_OUTPUT)) == "14.attn_output"
    assert all(Site.parse(str(Site(3, kind))) == Site(3, kind) for kind in SiteKind)


@pytest.mark.parametrize("text", ["", "14", "attn_output", "x.attn_output", "-1.residual", "1.5", "²._", "1.residual "])
def test_what_is_not_a_site_is_refused_by_name(text):
    with pytest.raises(ColumnError, match="not"):
        Site.parse(text)


def test_sites_sort_in_the_order_in_which_a_forward_pass_meets_them():
    order = [SiteKind.ATTN_HEADS, SiteKind.ATTN_OUTPUT, SiteKind.MLP_OUTPUT, SiteKind.RESIDUAL]
    expected = [Site(layer, kind) for layer in (2, 10) for kind in order]
    shuffled = expected[::2] + expected[1::2]
    assert sorted(shuffled) == expected


@pytest.mark.parametrize("layer", [-1, 1.5, "1", True])
def test_a_layer_is_a_whole_number(layer):
    with pytest.raises(ColumnError, match="layer"):
        Site(layer, SiteKind.RESIDUAL)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attribute": ""}, "attribute"),
        ({"attribute": "a\nb"}, "attribute"),
        ({"gate": "softmax"}, "gate must be one of sigmoid, constant, linear, cosine"),
        ({"vector": torch.zeros(2, 2)}, "vector of column 'truthfulness'"),
        ({"vector": torch.zeros(0)}, "vector"),
        ({"vector": torch.tensor([1.0, math.nan])}, "not finite"),
        ({"vector": torch.tensor([1e300, 0], dtype=torch.float64)}, "not finite"),
        ({"vector": torch.tensor([8e8, 8e8])}, "the norm of vector of column 'truthfulness' must be at most 1e"),
        ({"gate_weight": torch.tensor([3e38, 3e38])}, "the norm of gate_weight"),
        ({"gate_bias": -2e9}, "gate_bias of column 'truthfulness' must be at most 1e"),
        ({"range": (-4.0, 1e10)}, "range of column 'truthfulness' must be at most 1e"),
        ({"vector": torch.ones(3)}, "width 3"),
        ({"gate_bias": math.inf}, "gate_bias"),
        ({"default_multiplier": math.nan}, "default_multiplier"),
        ({"default_multiplier": 5.0, "range": (-4, 4)}, r"outside its range \[-4, 4\]"),
        ({"range": (4, -4)}, "range"),
        ({"reads": Reading(Site(7, SiteKind.RESIDUAL))}, "which a forward pass does not meet before"),
        ({"reads": Reading(HERE)}, "which a forward pass does not meet before"),
        ({"reads": Reading(Site(0, SiteKind.ATTN_HEADS)), "gate": Gate.CONSTANT}, "constant gate, which reads nothing"),
        ({"clamp": Clamp(2e9)}, "clamp of column 'truthfulness' must be at most 1e"),
        ({"clamp": Clamp(1.0, math.nan)}, "clamp of column 'truthfulness'"),
        ({"clamp": Clamp(1.0), "vector": torch.zeros(2)}, "is zero: it has no direction to clamp"),
    ],
)
def test_a_column_that_cannot_be_used_is_refused_by_name(changes, named):
    with pytest.raises(ColumnError, match=named):
        column(HERE, 2, **changes)


def test_a_column_owns_float32_copies_of_its_tensors():
    mine = torch.ones(4, dtype=torch.bfloat16)
    made = column(HERE, 4, vector=mine)
    mine.zero_()
    assert made.vector.dtype == torch.float32
    assert made.vector.tolist() == [1.0] * 4


def test_the_vector_of_a_clamp_has_length_1_and_stays_as_it_is_from_then_on():
    made = column(HERE, 4, vector=torch.tensor([3.0, 0, 4, 0]), clamp=Clamp(2.0))
    torch.testing.assert_close(made.vector, torch.tensor([0.6, 0, 0.8, 0]))
    assert torch.equal(replace(made).vector, made.vector)


def handle(*sites: Site) -> Handle:
    return Handle(tuple((site, i) for i, site in enumerate(sites)), tuple("abc"[: len(sites)]))


def test_a_row_lists_what_is_not_zero_in_site_order():
    one, other = handle(HERE, HERE), handle(THERE)
    row = SequenceSteering.of([(one, [0.0, 2.0]), (other, [-1.0])])
    assert row.slots == ((THERE, 0, -1.0), (HERE, 1, 2.0))
    assert row.sites == {HERE, THERE}
    assert row.without(other).slots == ((HERE, 1, 2.0),)


def test_a_handle_named_twice_adds_up():
    one = handle(HERE)
    assert SequenceSteering.of([(one, [1.0]), (one, [0.5])]).slots == ((HERE, 0, 1.5),)
    assert SequenceSteering.of([(one, [1.0]), (one, [-1.0])]).slots == ()


def test_rows_that_ask_for_the_same_are_equal():
    one = handle(HERE)
    assert SequenceSteering.of([(one, [1.0])]) == SequenceSteering.of([(one, [1])])
    assert hash(SequenceSteering.of([(one, [1.0])])) == hash(SequenceSteering.of([(one, [1])]))
    assert SequenceSteering.of([(one, [1.0])]) != SequenceSteering.of([(handle(HERE), [1.0])])


def test_equal_rows_have_one_digest_and_others_another():
    one, two = (Handle(((Site(1, "residual"), 0),), ("civility",)) for _ in range(2))
    rows = [[(one, (1.0,))], [(one, (2.0,))], [(two, (1.0,))], [(one, (1.0,)), (two, (1.0,))], []]
    digests = [SequenceSteering.of(row).digest for row in rows]
    assert digests == [SequenceSteering.of(row).digest for row in rows]
    assert len(set(digests)) == len(rows)


def test_a_multiplier_too_small_for_float32_does_not_steer():
    assert SequenceSteering.of([(handle(HERE), [1e-60])]).slots == ()


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [math.nan], [math.inf], [1e39]])
def test_multipliers_that_cannot_be_used_are_refused(values):
    with pytest.raises(ColumnError, match="multiplier"):
        SequenceSteering.of([(handle(HERE), values)])


def test_unsteered_asks_for_nothing():
    assert UNSTEERED.slots == ()
    assert {gate.code for gate in Gate} == {0, 1, 2, 3}
