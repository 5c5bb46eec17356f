"""What the losses of MAT-Steer (arXiv 2502.12446) are made of: kernels, and how each objective reduces.

Shapes: T attributes, and of each a batch of B positives followed by B negatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.choices import Kernel, Objective

_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MEDIAN_ROWS = 512


@dataclass(frozen=True, eq=False)
class Shares:
    """How an objective reduces: each loss term is the sum of its parts times these factors."""

    alignment: Tensor
    """[T], of each attribute's MMD^2."""
    positive: Tensor
    """[T, 2B, T], of the squares of the gates: data of attribute i under gate j; 0 on negatives."""
    sparse: Tensor
    """[T, 2B, T], of the gates themselves; 0 on positives."""


def shares(objective: Objective, batch: int, unsteered: Tensor) -> Shares:
    """The factors of an objective for batches of B; `unsteered` [T], each attribute's MMD^2 without steering, is the
    unit of `BALANCED`."""
    count = len(unsteered)
    one, own = torch.ones_like(unsteered), torch.eye(count).to(unsteered)
    alignment, penalty = {
        Objective.PAPER: (one, own),
        Objective.REFERENCE: (one / count, torch.ones_like(own) / (count * count * batch)),
        Objective.BALANCED: (1 / unsteered, own / batch),
    }[objective]
    on = penalty[:, None].expand(-1, batch, -1)
    off = torch.zeros_like(on)
    return Shares(alignment, torch.cat([on, off], 1), torch.cat([off, on], 1))


def gaussian(squares: Tensor, rates: Tensor) -> Tensor:
    """Kernel values exp(rate x) of squared distances x [A, N, M], for each of `rates` [A, K]: [A, K, N, M]."""
    return torch.exp_(squares[:, None] * rates[..., None, None])


def kernel_rates(sigmas: Tensor) -> Tensor:
    """The rates of Gaussian kernels exp(-x / (2 sigma^2)), of the same shape as `sigmas`."""
    return -0.5 / sigmas.square()


def squared_distances(inner: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[A, N, M] from the inner products [A, N, M] and the squared norms of both sides, [A, N] and [A, M]."""
    return torch.add(rows[:, :, None] + columns[:, None, :], inner, alpha=-2).clamp_min_(0)


def mmd2(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    """Biased squared maximum mean discrepancy of x [A, N, D] and y [A, M, D] with kernels `sigmas` [A, K]: [A]."""
    count, rows = x.shape[1], torch.cat([x, y], 1)
    rows = rows - rows.mean(1, keepdim=True)  # near the origin, an expanded square loses no digits
    inner = rows @ rows.mT
    norms = inner.diagonal(dim1=1, dim2=2)
    kernel = gaussian(squared_distances(inner, norms, norms), kernel_rates(sigmas)).mean(1)
    within, across = kernel[:, :count, :count].mean((1, 2)), kernel[:, :count, count:].mean((1, 2))
    return within + kernel[:, count:, count:].mean((1, 2)) - 2 * across


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


def orthogonality(products: Tensor) -> tuple[Tensor, Tensor]:
    """L_ortho, the squared cosines summed over pairs, from the inner products [T, T] of the vectors; and the matrix
    [T, T] that makes its gradient of the vectors. A zero vector has cosine 0."""
    inverse = products.diagonal().clamp_min(1e-24).rsqrt()
    units = torch.outer(inverse, inverse)
    angles = (products * units).fill_diagonal_(0)
    shared = angles.square()
    return shared.sum() / 2, 2 * (angles * units - torch.diag(shared.sum(1) * inverse.square()))


def cosines(vectors: Tensor) -> Tensor:
    """Cosines [T, T] between vectors [T, D]; 0 with a zero vector."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    return unit @ unit.mT


def _thin(rows: Tensor) -> Tensor:
    step = max(1, len(rows) // _MEDIAN_ROWS)
    return rows[::step][:_MEDIAN_ROWS]
