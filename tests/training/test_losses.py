"""Every loss equals a plain float64 transcription of its formula (arXiv 2502.12446)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from training.choices import Kernel, Objective
from training.losses import bandwidths, cosines, median_distance, mmd2, orthogonality, terms

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
    assert float(mmd2(x, y, sigmas)) == pytest.approx(expected, abs=2e-4)


def test_mmd_is_vectorised_over_attributes() -> None:
    x, y, sigmas = draw(0, 3, 4, 6), draw(1, 3, 5, 6), draw(2, 3, 2).abs() + 0.5
    found = mmd2(x, y, sigmas)
    for t in range(3):
        assert float(found[t]) == pytest.approx(plain_mmd2(to64(x[t]), to64(y[t]), to64(sigmas[t])), abs=1e-5)


def test_mmd_of_equal_clouds_is_zero() -> None:
    x = draw(0, 8, 5)
    assert float(mmd2(x, x, torch.tensor([2.0]))) == pytest.approx(0, abs=1e-6)


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
    assert float(orthogonality(vectors)) == pytest.approx(expected, rel=1e-5)
    vectors[0] = 0
    vectors.requires_grad_()
    orthogonality(vectors).backward()  # type: ignore[no-untyped-call]
    assert cosines(vectors)[0].tolist() == [0, 0, 0, 0]
    assert vectors.grad is not None
    assert bool(vectors.grad.isfinite().all())


@pytest.mark.parametrize("objective", list(Objective))
def test_objectives_reduce_as_they_say(objective: Objective) -> None:
    attributes, batch, width = 3, 4, 5
    positive, steered, vectors = draw(0, attributes, batch, width), draw(1, attributes, batch, width), draw(2, 3, width)
    on_positive, on_negative = draw(3, attributes, batch, attributes).sigmoid(), draw(4, 3, batch, 3).sigmoid()
    sigmas, unsteered = draw(5, attributes, 1).abs() + 1, draw(6, attributes).abs() + 0.5
    found = terms(
        objective,
        positive=positive,
        steered=steered,
        positive_gates=on_positive,
        negative_gates=on_negative,
        vectors=vectors,
        sigmas=sigmas,
        unsteered_mmd=unsteered,
    )
    mmds = [plain_mmd2(to64(positive[t]), to64(steered[t]), to64(sigmas[t])) for t in range(attributes)]
    own = [(data, row, data) for data in range(attributes) for row in range(batch)]
    every = [(data, row, gate) for data, row, _ in own for gate in range(attributes)]
    if objective is Objective.PAPER:
        alignment = sum(mmds)
        l_pos = sum(float(on_positive[i]) ** 2 for i in own)
        l_sparse = sum(abs(float(on_negative[i])) for i in own)
    elif objective is Objective.REFERENCE:
        alignment = sum(mmds) / attributes
        l_pos = sum(float(on_positive[i]) ** 2 for i in every) / len(every)
        l_sparse = sum(abs(float(on_negative[i])) for i in every) / len(every)
    else:
        alignment = sum(mmd / float(unit) for mmd, unit in zip(mmds, unsteered, strict=True))
        l_pos = sum(float(on_positive[i]) ** 2 for i in own) / batch
        l_sparse = sum(abs(float(on_negative[i])) for i in own) / batch
    assert float(found.mmd) == pytest.approx(alignment, abs=1e-5)
    assert float(found.positive) == pytest.approx(l_pos, rel=1e-5)
    assert float(found.sparse) == pytest.approx(l_sparse, rel=1e-5)
    assert found.mmds.tolist() == pytest.approx(mmds, abs=1e-5)
