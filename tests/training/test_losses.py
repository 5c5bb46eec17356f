"""Every loss equals a plain float64 transcription of its formula (arXiv 2502.12446)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from training.choices import Kernel, Objective
from training.methods.losses import bandwidths, cosines, median_distance, mmd2, orthogonality, shares

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
    assert float(orthogonality(vectors @ vectors.T)[0]) == pytest.approx(expected, rel=1e-5)
    vectors[0] = 0
    assert cosines(vectors)[0].tolist() == [0, 0, 0, 0]


def test_objectives_reduce_as_they_say() -> None:
    unsteered = torch.tensor([0.5, 0.25])
    expected = {
        Objective.PAPER: ([1, 1], [[1, 0], [0, 1]]),
        Objective.REFERENCE: ([1 / 2, 1 / 2], [[1 / 12, 1 / 12]] * 2),
        Objective.BALANCED: ([2, 4], [[1 / 3, 0], [0, 1 / 3]]),
    }
    for objective, (alignment, penalty) in expected.items():
        found = shares(objective, 3, unsteered)
        assert found.alignment.tolist() == pytest.approx(alignment)
        wanted = torch.tensor(penalty, dtype=torch.float32)[:, None].expand(2, 3, 2)
        torch.testing.assert_close(found.positive, torch.cat([wanted, 0 * wanted], 1))
        torch.testing.assert_close(found.sparse, torch.cat([0 * wanted, wanted], 1))
