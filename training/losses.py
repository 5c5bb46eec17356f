"""The four losses of MAT-Steer (arXiv 2502.12446), vectorised over T attributes.

Shapes: T attributes, B activations a side, D wide; gates are [T, B, T]: data of attribute i under gate j.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.choices import Kernel, Objective

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MEDIAN_ROWS = 512


@dataclass(frozen=True, eq=False)
class Terms:
    """The unweighted loss terms (scalars) and the MMD of each attribute [T]."""

    mmd: Tensor
    positive: Tensor
    sparse: Tensor
    orthogonal: Tensor
    mmds: Tensor


def mmd2(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    """Biased squared maximum mean discrepancy of x [.., N, D] and y [.., M, D], averaged over kernels: [..].

    The kernels are exp(-|x - y|^2 / (2 sigma^2)) for each of `sigmas` [.., K].
    """
    return _gaussian(x, x, sigmas) + _gaussian(y, y, sigmas) - 2 * _gaussian(x, y, sigmas)


def bandwidths(kernel: Kernel, positive: Tensor, negative: Tensor, sigma: float = 2.0) -> Tensor:
    """The sigmas [K] for one attribute's activations [P, D] and [N, D]."""
    if kernel is Kernel.FIXED:
        return torch.tensor([sigma])
    median = median_distance(torch.cat([_thin(positive), _thin(negative)])).to("cpu")
    return median[None] if kernel is Kernel.MEDIAN else median * torch.tensor(_BANDWIDTHS)


def median_distance(rows: Tensor) -> Tensor:
    """The median distance between two different rows of [N, D]; 1 where all rows are equal. A scalar."""
    distances = torch.pdist(rows)
    distances = distances[distances > 0]
    return distances.median() if len(distances) else torch.ones(())


def positive_preservation(gates: Tensor, objective: Objective) -> Tensor:
    """L_pos: squares of the gates [T, B, T] on positive activations."""
    return _reduce(gates.square(), objective)


def sparsity(gates: Tensor, objective: Objective) -> Tensor:
    """L_sparse: absolute values of the gates [T, B, T] on negative activations."""
    return _reduce(gates.abs(), objective)


def orthogonality(vectors: Tensor) -> Tensor:
    """L_ortho: squared cosines summed over the pairs of vectors [T, D]; a zero vector has cosine 0."""
    return cosines(vectors).square().triu(1).sum()


def cosines(vectors: Tensor) -> Tensor:
    """Cosines [T, T] between vectors [T, D]; 0 with a zero vector."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    return unit @ unit.mT


def terms(
    objective: Objective,
    *,
    positive: Tensor,
    steered: Tensor,
    positive_gates: Tensor,
    negative_gates: Tensor,
    vectors: Tensor,
    sigmas: Tensor,
    unsteered_mmd: Tensor,
) -> Terms:
    """Every term for positives [T, B, D], steered negatives [T, B, D], gates [T, B, T], vectors [T, D], sigmas [T, K].

    `unsteered_mmd` [T] is the MMD^2 without steering, the unit of `BALANCED`.
    """
    mmds = mmd2(positive, steered, sigmas)
    if objective is Objective.BALANCED:
        alignment = (mmds / unsteered_mmd).sum()
    else:
        alignment = mmds.mean() if objective is Objective.REFERENCE else mmds.sum()
    return Terms(
        mmd=alignment,
        positive=positive_preservation(positive_gates, objective),
        sparse=sparsity(negative_gates, objective),
        orthogonal=orthogonality(vectors),
        mmds=mmds,
    )


def _reduce(penalties: Tensor, objective: Objective) -> Tensor:
    if objective is Objective.REFERENCE:
        return penalties.mean()
    own = penalties.diagonal(dim1=0, dim2=2)  # [B, T]
    return own.mean(0).sum() if objective is Objective.BALANCED else own.sum()


def _gaussian(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    # Distances do not change with the origin; near the data, the expanded square loses no digits.
    origin = x.detach().mean(-2, keepdim=True)
    x, y = x - origin, y - origin
    squared = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    squared = squared.clamp_min(0)
    scale = 2 * sigmas.square()[..., None, None]  # [.., K, 1, 1]
    return torch.exp(-squared.unsqueeze(-3) / scale).mean((-1, -2, -3))


def _thin(rows: Tensor) -> Tensor:
    step = max(1, len(rows) // _MEDIAN_ROWS)
    return rows[::step][:_MEDIAN_ROWS]
