"""Difference in means and the probe direction, against what they are by definition."""

import torch

from steering import Gate, Site, SiteKind
from tests.training.clouds import make_clouds
from training.methods.caa import fit_difference
from training.methods.probe import fit_logistic, fit_probe, probe_direction

SITE = Site(1, SiteKind.RESIDUAL)


def test_the_difference_in_means_is_just_that() -> None:
    train = make_clouds().train
    for column in fit_difference(train, SITE):
        contrast = train[column.attribute]
        assert torch.equal(column.vector, contrast.positive.mean(0) - contrast.negative.mean(0))
        assert (column.gate, column.keep_norm, column.site) == (Gate.CONSTANT, False, SITE)
    assert all(column.keep_norm for column in fit_difference(train, SITE, normalize=True))


def test_the_probe_finds_the_direction_scaled_by_the_spread_along_it() -> None:
    clouds = make_clouds(count=400)
    for column, direction in zip(fit_probe(clouds.train, SITE, penalty=10.0), clouds.directions, strict=True):
        unit = probe_direction(clouds.train[column.attribute], penalty=10.0)
        assert float(unit @ direction) > 0.9
        contrast = clouds.train[column.attribute]
        spread = (torch.cat([contrast.positive, contrast.negative]) @ unit).std()
        torch.testing.assert_close(column.vector, spread * unit)


def test_the_probe_is_at_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 4, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(80, generator=generator) > 0.8).float()
    weights, bias = fit_logistic(x, y, penalty=2.0)
    w, b = weights.double().requires_grad_(), bias.double().requires_grad_()
    share = y.double().mean()
    balance = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    z = x.double() @ w + b
    loss = (balance * torch.nn.functional.softplus(torch.where(y > 0, -z, z))).sum() + w.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    assert b.grad is not None
    assert float(w.grad.abs().max()) < 1e-3
    assert abs(float(b.grad)) < 1e-3


def test_a_separable_probe_stays_finite() -> None:
    weights, bias = fit_logistic(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, 0.0]))
    assert bool(weights.isfinite().all())
    assert bool(bias.isfinite())
