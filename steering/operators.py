"""Gate, delta and norm-preserving apply (arXiv 2502.12446, eq. 1-3) as pure functions on tensors.

Everything is computed in float32 whatever the dtype of the activations (in float64 for float64), because a
half-precision sum of squares overflows at the widths that models have. There is no control flow that depends on the
values, so that the functions can be captured in a CUDA graph or compiled.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from steer_ops.plain import full_precision, gates, steer, strengths, widen
from steering.types import Gate

__all__ = ["Trace", "gate_codes", "gate_values", "steer", "trace"]


@dataclass(frozen=True)
class Trace:
    """What each column does to each token; every tensor is [N, C] float32."""

    gates: Tensor
    strengths: Tensor  # the vector's factor: multiplier x gate, or gate x (target - projection)
    delta_norms: Tensor  # |strength x v|, before the norm rescale
    cosines: Tensor  # between the delta and the activation; 0 where one of them is zero


def gate_codes(gates: Iterable[Gate], device: torch.device | str | None = None) -> Tensor:
    """The `kinds` argument of the functions below: int8 [C]."""
    return torch.tensor([Gate(gate).code for gate in gates], dtype=torch.int8, device=device)


def gate_values(activations: Tensor, weights: Tensor, biases: Tensor, kinds: Tensor) -> Tensor:
    """How open each column's gate is on each token (arXiv 2502.12446, eq. 2, and the other kinds of `Gate`).

    activations [N, D], weights [C, D], biases [C], kinds [C] (`gate_codes`) -> [N, C] float32.
    """
    with full_precision(activations):
        a, w, b = widen(activations, weights, biases)
        return gates(a, w, b, kinds)


def trace(
    activations: Tensor,
    vectors: Tensor,
    weights: Tensor,
    biases: Tensor,
    kinds: Tensor,
    multipliers: Tensor,
    *,
    clamps: Tensor | None = None,
    opened: Tensor | None = None,
) -> Trace:
    """What `steer` does with these arguments, for each token and column. Shapes as for `steer`."""
    with full_precision(activations):
        a, v, w, b, m = widen(activations, vectors, weights, biases, multipliers)
        found = gates(a, w, b, kinds, opened)
        factors = strengths(a, v, found, m, clamps)
        widths = torch.linalg.vector_norm(v, dim=1)
        lengths = torch.linalg.vector_norm(a, dim=1, keepdim=True) * widths
        overlap = (a @ v.T) / torch.where(lengths > 0, lengths, 1)
        return Trace(found, factors, factors.abs() * widths, torch.sign(factors) * overlap)
