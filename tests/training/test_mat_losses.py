"""The losses of MAT-Steer equal float64 transcriptions of their formulas (arXiv 2502.12446), and so does a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.mat_loop import Loop
from steering import Site, SiteKind
from tests.training.clouds import make_clouds
from tests.training.plain_mat import Plain
from training.methods.mat import Kernel, MatConfig, Objective
from training.methods.mat_model import (
    Batch,
    GatedVectors,
    Loss,
    Scaler,
    TrainingSet,
    all_bandwidths,
    bandwidths,
    cosines,
    median_distance,
    mmd2,
    orthogonality,
)
from training.methods.mat_training import fit_mat, train_step

Array = NDArray[np.float64]


def plain_mmd2(x: Array, y: Array, sigmas: Array) -> float:
    def kernel(a: Array, b: Array) -> float:
        values = [np.exp(-((p - q) ** 2).sum() / (2 * s**2)) for p in a for q in b for s in sigmas]
        return float(np.mean(values))

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to64(tensor: Tensor) -> Array:
    return tensor.double().numpy()


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50), st.floats(0, 100), st.integers(1, 7), st.integers(1, 7))
def test_mmd_equals_its_transcription(seed: int, scale: float, shift: float, n: int, m: int) -> None:
    x, y = draw(seed, n, 5, scale=scale) + shift, draw(seed + 1, m, 5, scale=scale) + shift
    sigmas = torch.tensor([2.0, scale])
    expected = plain_mmd2(to64(x), to64(y), to64(sigmas))
    assert float(mmd2(x[None], y[None], sigmas[None])) == pytest.approx(expected, abs=2e-4)


def test_mmd_is_vectorised_over_attributes() -> None:
    x, y, sigmas = draw(0, 3, 4, 6), draw(1, 3, 5, 6), draw(2, 3, 2).abs() + 0.5
    found = mmd2(x, y, sigmas)
    for t in range(3):
        assert float(found[t]) == pytest.approx(plain_mmd2(to64(x[t]), to64(y[t]), to64(sigmas[t])), abs=1e-5)


def test_mmd_of_equal_clouds_is_zero() -> None:
    x = draw(0, 1, 8, 5)
    assert float(mmd2(x, x, torch.tensor([[2.0]]))) == pytest.approx(0, abs=1e-6)


def test_the_bandwidths_of_each_kernel() -> None:
    positive, negative = draw(0, 20, 5), draw(1, 30, 5) + 3
    rows = to64(torch.cat([positive, negative]))
    distances = sorted(np.linalg.norm(rows[i] - rows[j]) for i in range(50) for j in range(i))
    median = distances[(len(distances) - 1) // 2]
    assert bandwidths(Kernel.FIXED, positive, negative, 2.0).tolist() == [2.0]
    assert float(bandwidths(Kernel.MEDIAN, positive, negative)) == pytest.approx(median, rel=1e-5)
    multi = bandwidths(Kernel.MULTI, positive, negative)
    assert multi.tolist() == pytest.approx([median * f for f in (0.25, 0.5, 1, 2, 4)], rel=1e-5)
    assert float(median_distance(torch.ones(4, 3))) == 1


def test_orthogonality_sums_squared_cosines_over_pairs() -> None:
    vectors = draw(0, 4, 6)
    v = to64(vectors)
    expected = sum(
        (v[i] @ v[j] / np.linalg.norm(v[i]) / np.linalg.norm(v[j])) ** 2 for i in range(4) for j in range(i + 1, 4)
    )
    assert float(orthogonality(vectors @ vectors.T)) == pytest.approx(expected, rel=1e-5)
    vectors[0] = 0
    assert cosines(vectors)[0].tolist() == [0, 0, 0, 0]


def test_objectives_reduce_as_they_say() -> None:
    sigmas, unsteered = torch.ones(2, 1), torch.tensor([0.5, 0.25])
    expected = {
        Objective.PAPER: ([1, 1], [[1, 0], [0, 1]]),
        Objective.REFERENCE: ([1 / 2, 1 / 2], [[1 / 12, 1 / 12]] * 2),
        Objective.BALANCED: ([2, 4], [[1 / 3, 0], [0, 1 / 3]]),
    }
    for objective, (alignment, penalty) in expected.items():
        found = Loss.of(MatConfig(objective=objective, batch=3), sigmas, unsteered)
        signs = torch.tensor([1.0] * 3 + [-1.0] * 3) / 3
        for own, factor in zip(found.pairs[:, 0], alignment, strict=True):
            torch.testing.assert_close(own, factor * torch.outer(signs, signs))
        wanted = torch.tensor(penalty, dtype=torch.float32)[:, None].expand(2, 3, 2)
        torch.testing.assert_close(found.positive, torch.cat([wanted, 0 * wanted], 1))
        torch.testing.assert_close(found.sparse, torch.cat([0 * wanted, wanted], 1))


T, B, D = 3, 4, 6
BASE = MatConfig(batch=B, l_pos=0.9, l_sparse=0.3, l_ortho=0.7)


def draw64(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(config: MatConfig, kernels: int, centred: bool) -> tuple[Loss, GatedVectors, Batch, tuple[Tensor, ...]]:
    """In float64, with data away from 0; `centred`: gates see their data less its middle, in units of its own."""
    positive, negative = draw64(0, T, B, D) + 1.5, draw64(1, T, B, D) + 0.5
    sigmas, unsteered = draw64(2, T, kernels).abs() + 1, draw64(3, T).abs() + 0.5
    origin = torch.cat([positive, negative]).mean((0, 1))
    ratios = draw64(7, T, 1).abs() + 0.5 if centred else torch.ones(T, 1, dtype=torch.float64)
    centres = torch.cat([positive, negative], 1).mean(1) if centred else torch.zeros_like(origin).expand(T, D)
    scaler = Scaler(1.0, origin, centres, ratios)
    parameters = [value.requires_grad_() for value in (draw64(4, T, D), draw64(5, T, D) / 2, draw64(6, T))]
    model = GatedVectors.of(parameters, scaler, config.normalize)
    batch = Batch.of(torch.cat([positive, negative], 1) - origin, origin, 2 * B)
    return Loss.of(config, sigmas, unsteered), model, batch, (positive, negative, sigmas, unsteered)


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("kernels", "centred"), [(1, True), (3, False)])
def test_losses_and_gradient_are_those_of_the_formulas(
    objective: Objective, joint: bool, normalize: bool, kernels: int, centred: bool
) -> None:
    config = replace(BASE, objective=objective, joint=joint, normalize=normalize)
    loss, model, batch, data = world(config, kernels, centred)
    found = loss(model, batch)
    gradients = torch.autograd.grad(found @ loss.weights, model.parameters())
    parameters = [value.detach().clone().requires_grad_() for value in model.parameters()]
    expected = Plain(*parameters, model.scaler.centres, model.scaler.ratios, config).losses(*data)
    wanted = torch.autograd.grad(expected[0], parameters)
    torch.testing.assert_close(found.detach(), expected[1:].detach(), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_a_vector_of_zeros_has_a_gradient() -> None:
    loss, model, batch, _ = world(BASE, 1, True)
    with torch.no_grad():
        model.vectors[1] = 0
    found = loss(model, batch)
    gradients = torch.autograd.grad(found @ loss.weights, model.parameters())
    assert all(bool(part.isfinite().all()) for part in (found, *gradients))


SITE = Site(1, SiteKind.ATTN_OUTPUT)
LOOP = MatConfig(
    objective=Objective.REFERENCE, kernel=Kernel.FIXED, sigma=8.0, joint=True, standardize=False, batch=16, epochs=3,
    l_pos=0.9, l_sparse=0.9, l_ortho=0.1, lr=0.01,
)  # fmt: skip


def test_the_same_losses_and_columns_as_the_published_loop() -> None:
    data = make_clouds(width=48, norm=8.0, count=64).train
    scaler = Scaler.of(data, LOOP.standardize)
    scaled = scaler.apply(data)
    table = TrainingSet.of(scaled, scaler.origin)
    sigmas = all_bandwidths(scaled, scaler, LOOP)
    loss, model = Loss.of(LOOP, sigmas, torch.ones(3)), GatedVectors.start(scaled, scaler, LOOP)
    optimizer = torch.optim.Adam(model.parameters(), lr=LOOP.lr, fused=True)
    loop = Loop(model.vectors.detach(), LOOP.sigma, LOOP.l_pos, LOOP.l_sparse, LOOP.l_ortho, LOOP.lr)
    originals = torch.cat([side for contrast in data.values() for side in (contrast.positive, contrast.negative)])
    epochs = []
    for epoch in range(1, LOOP.epochs + 1):
        losses = []
        for index in table.batches(LOOP.batch, LOOP.seed, epoch):
            expected = loop.step([(originals[rows[:16]], originals[rows[16:]]) for rows in index])
            found = float(train_step(model, table.batch(index), loss, optimizer) @ loss.weights)
            assert found == pytest.approx(expected, abs=1e-5)
            losses.append(found)
        epochs.append(sum(losses) / len(losses))

    fit = fit_mat(data, SITE, LOOP)
    assert [epoch.losses["loss"] for epoch in fit.history[1:]] == pytest.approx(epochs, abs=1e-5)
    for column, vector, gate in zip(fit.columns, loop.vectors, loop.gates, strict=True):
        torch.testing.assert_close(column.vector, vector.detach(), rtol=1e-3, atol=1e-4)
        assert column.gate_weight is not None
        torch.testing.assert_close(column.gate_weight, gate.weight.detach()[0], rtol=1e-3, atol=1e-4)
