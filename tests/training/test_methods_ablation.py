"""Directional ablation: the direction that tells the sides apart is found, and nothing is left along it."""

import pytest
import torch

from steering import Gate, Site, SiteKind, steer
from tests.training.planted import NAME, labelled, unit_vector, with_directions
from training.errors import FitError
from training.methods.ablation import AblationConfig, fit_ablation

WIDTH = 32
SITES = [Site(0, SiteKind.RESIDUAL), Site(1, SiteKind.MLP_OUTPUT), Site(1, SiteKind.RESIDUAL)]
DIRECTIONS = {site: unit_vector(WIDTH, seed) for seed, site in enumerate(SITES)}
PLANTED = with_directions(DIRECTIONS)


@pytest.mark.parametrize("source", SITES)
def test_every_site_loses_the_direction_of_the_source(source: Site) -> None:
    columns = fit_ablation(PLANTED, NAME, SITES, AblationConfig(source))
    assert [column.site for column in columns] == SITES
    for column in columns:
        assert (column.gate, column.keep_norm, column.default_multiplier) == (Gate.LINEAR, False, 1.0)
        assert float(column.gate_weight @ DIRECTIONS[source]) > 0.95
        assert torch.equal(column.vector, -column.gate_weight)
        assert float(column.gate_weight.double().norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("multiplier", [1.0, 0.5, -1.0])
def test_the_part_along_the_direction_is_what_changes(multiplier: float) -> None:
    (column,) = fit_ablation(PLANTED, NAME, SITES[:1])
    a = 50 * PLANTED.values[SITES[0]]
    after = steer(
        a, column.vector[None], column.gate_weight[None], torch.zeros(1), torch.tensor([column.gate.code]).char(),
        torch.tensor([False]), torch.full((len(a), 1), multiplier),
    )  # fmt: skip
    r, wide = column.gate_weight.double(), a.double()
    expected = wide - multiplier * (wide @ r)[:, None] * r
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(after.double() @ r, (1 - multiplier) * (wide @ r), rtol=1e-4, atol=1e-4)


def test_at_one_site_the_direction_is_its_own() -> None:
    (column,) = fit_ablation(PLANTED, NAME, SITES[2:])
    assert float(column.gate_weight @ DIRECTIONS[SITES[2]]) > 0.95


def test_several_sites_need_a_source() -> None:
    with pytest.raises(FitError, match="needs a source"):
        fit_ablation(PLANTED, NAME, SITES)


def test_heads_have_no_residual_direction() -> None:
    heads = Site(0, SiteKind.ATTN_HEADS)
    for sites, source in (([heads], None), (SITES, heads)):
        with pytest.raises(FitError, match=r"not at 0\.attn_heads"):
            fit_ablation(PLANTED, NAME, sites, AblationConfig(source))


def test_a_source_that_was_not_extracted_is_named() -> None:
    with pytest.raises(FitError, match=r"No activations were extracted at site 7\.residual"):
        fit_ablation(PLANTED, NAME, SITES, AblationConfig(Site(7, SiteKind.RESIDUAL)))


def test_sides_that_are_the_same_have_no_direction() -> None:
    same = labelled({SITES[0]: torch.ones(4, WIDTH)}, torch.arange(4) % 2 == 0)
    with pytest.raises(FitError, match="there is no direction"):
        fit_ablation(same, NAME, SITES[:1])
