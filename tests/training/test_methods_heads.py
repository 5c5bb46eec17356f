"""Heads: their probes find those that tell, ITI moves these and no others, ablation replaces what they put out."""

import pytest
import torch

from steering import Column, Gate, Site, SiteKind, gate_codes, site_width, steer
from tests.steering import families
from tests.training.planted import (
    HEAD_WIDTH,
    HEADS,
    NAME,
    heads_site,
    in_head,
    labelled,
    unit_vector,
    with_directions,
)
from training.activations.extraction import head_count
from training.activations.store import Activations
from training.errors import FitError
from training.methods.base import Direction
from training.methods.head_ablation import Fill, HeadAblationConfig, fit_head_ablation
from training.methods.heads import Head, ProbingConfig, parse_heads, probe_heads
from training.methods.iti import ItiConfig, fit_iti

SITES = [heads_site(layer) for layer in range(3)]
TELLING = {Head(0, 2): unit_vector(HEAD_WIDTH, 1), Head(2, 1): unit_vector(HEAD_WIDTH, 2)}
NOTHING = torch.zeros(HEADS * HEAD_WIDTH)


@pytest.fixture(scope="module")
def planted() -> Activations:
    """Two of twelve heads tell the sides apart."""
    directions = dict.fromkeys(SITES, NOTHING)
    for head, direction in TELLING.items():
        directions[head.site] = in_head(head.index, direction)
    return with_directions(directions)


def apply(columns: tuple[Column, ...], activations: torch.Tensor, multiplier: float = 1.0) -> torch.Tensor:
    """All columns, of one site, on every row."""
    return steer(
        activations,
        torch.stack([column.vector for column in columns]),
        torch.stack([column.gate_weight for column in columns]),
        torch.tensor([column.gate_bias for column in columns]),
        gate_codes([column.gate for column in columns]),
        torch.tensor([column.keep_norm for column in columns]),
        torch.full((len(activations), len(columns)), multiplier),
    )


def test_the_probes_rank_the_telling_heads_first(planted: Activations) -> None:
    probes = probe_heads(planted, NAME, SITES)
    assert len(probes) == len(SITES) * HEADS
    assert {probe.head for probe in probes[:2]} == set(TELLING)
    assert all(probe.accuracy > 0.85 for probe in probes[:2])
    assert all(0.3 < probe.accuracy < 0.7 for probe in probes[2:])
    assert [probe.accuracy for probe in probes] == sorted((probe.accuracy for probe in probes), reverse=True)


@pytest.mark.parametrize("direction", [Direction.MEAN, Direction.PROBE])
def test_iti_moves_the_telling_heads_by_a_deviation_and_no_others(planted: Activations, direction: Direction) -> None:
    fitted = fit_iti(planted, NAME, SITES, ItiConfig(top=2, direction=direction))
    assert [column.site for column in fitted.columns] == [SITES[0], SITES[2]]
    weights = {probe.head: probe.weights.double() for probe in fitted.probes}
    for column, (head, planted_direction) in zip(fitted.columns, TELLING.items(), strict=True):
        assert (column.gate, column.keep_norm) == (Gate.CONSTANT, False)
        span = head.span(HEAD_WIDTH)
        shift = column.vector[span]
        assert float(torch.cosine_similarity(shift, planted_direction, dim=0)) > 0.95
        assert torch.count_nonzero(column.vector) == HEAD_WIDTH
        rows = planted.values[head.site][:, span].double()
        towards = rows[planted.labels].mean(0) - rows[~planted.labels].mean(0)
        along = towards if direction is Direction.MEAN else weights[head]
        along = along / along.norm()
        torch.testing.assert_close(shift.double(), (rows @ along).std(correction=0) * along, rtol=1e-5, atol=1e-6)


def test_iti_takes_all_heads_where_there_are_fewer_than_it_takes_by_default(planted: Activations) -> None:
    columns = fit_iti(planted, NAME, SITES).columns
    assert [column.site for column in columns] == SITES
    assert all(bool(column.vector.any()) for column in columns)


def test_a_head_that_only_knows_the_group_is_not_accurate() -> None:
    """What rows of one group share separates the groups that a probe has seen; held-out groups it says nothing of."""
    generator = torch.Generator().manual_seed(0)
    groups, rows, width = 40, 6, 64
    sides = torch.arange(groups) % 2 == 0
    values = torch.randn(groups, width, generator=generator).repeat_interleave(rows, dim=0)
    labels = sides.repeat_interleave(rows)
    names = [str(row // rows) for row in range(groups * rows)]
    by_group = labelled({SITES[0]: values}, labels, names, heads=1)
    by_row = labelled({SITES[0]: values}, labels, heads=1)
    accuracies = [probe_heads(by_group, NAME, SITES[:1], ProbingConfig(seed=seed))[0].accuracy for seed in range(5)]
    assert sum(accuracies) / 5 < 0.75
    assert probe_heads(by_row, NAME, SITES[:1])[0].accuracy > 0.95


def test_probes_are_the_same_for_the_same_seed(planted: Activations) -> None:
    first, again, other = (
        [(probe.head, probe.accuracy) for probe in probe_heads(planted, NAME, SITES, ProbingConfig(seed=seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("top", [1, 3])
def test_zero_ablation_is_exact_and_touches_nothing_else(planted: Activations, top: int) -> None:
    columns = fit_head_ablation(planted, NAME, SITES[2:], HeadAblationConfig(top=top)).columns
    assert len(columns) == top * HEAD_WIDTH
    before = 100 * planted.values[SITES[2]]
    after = apply(columns, before)
    ablated = torch.stack([column.gate_weight for column in columns]).sum(0) > 0
    assert int(ablated.sum()) == top * HEAD_WIDTH
    assert torch.equal(after[:, ablated], torch.zeros_like(after[:, ablated]))
    assert torch.equal(after[:, ~ablated], before[:, ~ablated])
    halved = apply(columns, before, 0.5)
    torch.testing.assert_close(halved[:, ablated], before[:, ablated] / 2)


def test_mean_ablation_puts_the_mean_of_both_sides(planted: Activations) -> None:
    config = HeadAblationConfig(heads=parse_heads("2.3,2.1"), fill=Fill.MEAN)
    fitted = fit_head_ablation(planted, NAME, SITES, config)
    assert fitted.probes == ()
    values = planted.values[SITES[2]]
    after, spans = apply(fitted.columns, values), [head.span(HEAD_WIDTH) for head in config.heads]
    for span in spans:
        mean = values.double()[:, span].mean(0)
        torch.testing.assert_close(after[:, span].double(), mean.expand(len(after), -1), rtol=0, atol=1e-6)
    rest = torch.ones(values.shape[1], dtype=torch.bool)
    for span in spans:
        rest[span] = False
    assert torch.equal(after[:, rest], values[:, rest])


def test_heads_are_written_layer_and_index() -> None:
    assert parse_heads("14.3, 2.11,14.3") == (Head(2, 11), Head(14, 3))
    assert str(Head(14, 3)) == "14.3"
    assert Head(14, 3).site == Site(14, SiteKind.ATTN_HEADS)
    assert Head(14, 3).span(64) == slice(192, 256)
    for wrong in ("14", "14.", "a.3", "-1.3", "1.2.3", ""):
        with pytest.raises(FitError, match=r"LAYER\.HEAD"):
            parse_heads(wrong)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "gpt_neox"])
def test_the_number_of_heads_is_the_models(family: str) -> None:
    assert head_count(families.tiny(family)) == families.HEADS
    assert site_width(families.tiny(family), SiteKind.ATTN_HEADS) == families.FAMILIES[family].heads_width


def few(count: int) -> Activations:
    return labelled({SITES[0]: torch.zeros(count, 4)}, torch.arange(count) % 2 == 0)


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (lambda p: fit_iti(p, NAME, SITES, ItiConfig(top=13)), "13 best heads were asked for, but there are 12"),
        (lambda p: fit_iti(p, NAME, [Site(0, SiteKind.RESIDUAL)]), "iti acts on attn_heads"),
        (lambda p: fit_iti(p, NAME, [heads_site(9)]), "No activations were extracted at site 9.attn_heads"),
        (lambda p: ItiConfig(direction=Direction.PCA), "mean or probe, not pca"),
        (lambda p: fit_iti(few(2), NAME, SITES[:1]), "too few groups"),
        (lambda p: fit_iti(labelled({SITES[0]: torch.randn(8, 4)}, torch.arange(8) > 3, heads=None), NAME, SITES[:1]),
         "do not say how many heads share the 4 dimensions of site 0.attn_heads"),
        (lambda p: fit_head_ablation(p, NAME, SITES, HeadAblationConfig()), "needs the heads, or how many"),
        (lambda p: fit_head_ablation(p, NAME, SITES, HeadAblationConfig(heads=(Head(1, 4),))), "There is no head 1.4"),
        (lambda p: fit_head_ablation(p, NAME, SITES[:1], HeadAblationConfig(heads=(Head(1, 3),))), "is not among"),
        (lambda p: fit_head_ablation(p, NAME, [Site(0, SiteKind.MLP_OUTPUT)], HeadAblationConfig(top=1)), "acts on"),
        (lambda p: HeadAblationConfig(heads=parse_heads("1.3"), top=3), "not both"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_said_in_one_sentence(planted, fail, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FitError, match=said):
        fail(planted)
