"""Control vectors: a vector at every layer, along what the pairs of each layer have in common."""

import pytest
import torch

from steering import Gate, Site, SiteKind
from tests.training.planted import NAME, labelled, unit_vector, with_directions
from training.activations.store import Activations
from training.errors import FitError
from training.methods.base import Direction
from training.methods.control import ControlConfig, Scale, fit_control

WIDTH = 32
SITES = [Site(layer, SiteKind.RESIDUAL) for layer in (1, 2, 4)]
DIRECTIONS = {site: unit_vector(WIDTH, site.layer) for site in SITES}
PLANTED = with_directions(DIRECTIONS)


def difference(activations: Activations, site: Site) -> torch.Tensor:
    values = activations.values[site]
    return values[activations.labels].mean(0) - values[~activations.labels].mean(0)


@pytest.mark.parametrize("direction", [Direction.MEAN, Direction.PCA])
@pytest.mark.parametrize("scale", list(Scale))
def test_each_layer_points_from_negative_to_positive(direction: Direction, scale: Scale) -> None:
    columns = fit_control(PLANTED, NAME, SITES, ControlConfig(direction, scale))
    assert [column.site for column in columns] == SITES
    for column in columns:
        assert (column.gate, column.keep_norm, column.attribute) == (Gate.CONSTANT, False, NAME)
        assert float(torch.cosine_similarity(column.vector, DIRECTIONS[column.site], dim=0)) > 0.95
        along = column.vector / column.vector.norm()
        length = {
            Scale.DIFFERENCE: difference(PLANTED, column.site) @ along,
            Scale.UNIT: torch.tensor(1.0),
            Scale.NORM: PLANTED.values[column.site].norm(dim=1).mean(),
        }[scale]
        torch.testing.assert_close(column.vector.norm(), length, rtol=1e-5, atol=1e-6)


def test_the_mean_at_its_own_length_is_the_difference_in_means() -> None:
    for column in fit_control(PLANTED, NAME, SITES):
        torch.testing.assert_close(column.vector, difference(PLANTED, column.site))


def test_coefficients_are_factors_on_their_layers() -> None:
    plain = fit_control(PLANTED, NAME, SITES)
    scaled = fit_control(PLANTED, NAME, SITES, ControlConfig(coefficient={2: 0.5, 4: -2.0}))
    for one, other, factor in zip(plain, scaled, (1.0, 0.5, -2.0), strict=True):
        torch.testing.assert_close(other.vector, factor * one.vector)


def paired(shared: torch.Tensor, varied: torch.Tensor, *, drift: float, pairs: int = 200) -> Activations:
    """Pairs that lie far apart from each other; within a pair the sides differ by `shared`, and by `varied` times a
    number that is as often negative as positive."""
    generator = torch.Generator().manual_seed(3)
    middles = drift * torch.randn(pairs, WIDTH, generator=generator)
    halves = shared / 2 + varied / 2 * torch.randn(pairs, 1, generator=generator)
    halves = halves + 0.05 * torch.randn(pairs, WIDTH, generator=generator)
    values = torch.stack([middles + halves, middles - halves], dim=1).flatten(0, 1)
    return labelled({SITES[0]: values}, torch.arange(2 * pairs) % 2 == 0, [str(row // 2) for row in range(2 * pairs)])


def test_pca_sees_the_pairs_and_not_what_sets_them_apart_from_each_other() -> None:
    shared = 2 * unit_vector(WIDTH, 7)
    (column,) = fit_control(paired(shared, 0 * shared, drift=50), NAME, SITES[:1], ControlConfig(Direction.PCA))
    torch.testing.assert_close(column.vector, shared, rtol=0, atol=0.05)


def test_pca_keeps_what_all_pairs_share() -> None:
    """Centred, the differences would have their largest variance along `varied`."""
    shared, varied = 2 * unit_vector(WIDTH, 7), unit_vector(WIDTH, 8)
    varied = varied - (varied @ shared) * shared / 4
    (column,) = fit_control(paired(shared, varied, drift=1), NAME, SITES[:1], ControlConfig(Direction.PCA))
    assert float(torch.cosine_similarity(column.vector, shared, dim=0)) > 0.98


def test_pca_turns_with_the_labels() -> None:
    turned = labelled(PLANTED.values, ~PLANTED.labels, PLANTED.groups)
    config = ControlConfig(Direction.PCA)
    for one, other in zip(fit_control(PLANTED, NAME, SITES, config), fit_control(turned, NAME, SITES, config),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one.vector, -other.vector)


def test_groups_with_one_side_are_left_out_of_pca_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    whole = paired(2 * unit_vector(WIDTH, 7), torch.zeros(WIDTH), drift=0, pairs=20)
    single = labelled({SITES[0]: torch.cat([whole.values[SITES[0]], torch.full((1, WIDTH), 1000.0)])},
                      torch.cat([whole.labels, torch.tensor([True])]), (*whole.groups, "alone"))  # fmt: skip
    (column,) = fit_control(single, NAME, SITES[:1], ControlConfig(Direction.PCA, Scale.UNIT))
    (expected,) = fit_control(whole, NAME, SITES[:1], ControlConfig(Direction.PCA, Scale.UNIT))
    torch.testing.assert_close(column.vector.abs(), expected.vector.abs())
    assert "1 of 21 groups of 'truth' have one side only" in caplog.text


def test_pca_without_pairs_is_refused() -> None:
    apart = labelled(PLANTED.values, PLANTED.labels)
    with pytest.raises(FitError, match="pca needs pairs"):
        fit_control(apart, NAME, SITES, ControlConfig(Direction.PCA))


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(FitError, match="names layer 3; the layers are 1, 2, 4"):
        fit_control(PLANTED, NAME, SITES, ControlConfig(coefficient={3: 1.0}))
    with pytest.raises(FitError, match="mean or pca, not probe"):
        ControlConfig(Direction.PROBE)
