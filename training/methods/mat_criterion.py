"""The losses of a batch of MAT-Steer and their gradient (arXiv 2502.12446), vectorised over the attributes.

The gradient is written out: the bookkeeping of autograd would take longer than the many small operations themselves.

Shapes: T attributes, of each B positives and then B negatives; K kernels; D wide.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from training.methods.losses import gaussian, kernel_rates, orthogonality, shares
from training.methods.mat_config import MatConfig
from training.methods.mat_data import Rows
from training.methods.mat_model import Model
from training.methods.mat_steered import Steered


@dataclass(frozen=True, eq=False)
class Losses:
    """Of one batch, with the gradient of their weighted sum."""

    terms: Tensor  # [4], not weighted: mmd, positive, sparse, orthogonal
    gradient: tuple[Tensor, Tensor, Tensor]  # of the model's vectors, weights and biases


@dataclass(frozen=True, eq=False)
class Criterion:
    """What is minimised."""

    acting: Tensor  # [T, 2B, T]: 1 where a gate acts
    pairs: Tensor  # [T, 1, 2B, 2B]: the factor of each pair's kernels in the alignment loss
    rates: Tensor  # [T, K], of the kernels
    positive: Tensor  # [T, 2B, T]: of each squared gate in L_pos
    sparse: Tensor  # [T, 2B, T]: of each gate in L_sparse
    config: MatConfig

    @classmethod
    def of(cls, config: MatConfig, sigmas: Tensor, unsteered: Tensor) -> Self:
        """`sigmas` [T, K] of the kernels; `unsteered` [T]: the MMD^2 of each attribute without steering."""
        count, side = len(unsteered), torch.ones(config.batch).to(unsteered)
        share = shares(config.objective, config.batch, unsteered)
        signs = torch.cat([side, -side]) / config.batch
        gates = torch.ones(count, count) if config.joint else torch.eye(count)
        acting = (signs < 0).to(unsteered)[:, None] * gates.to(unsteered)[:, None]
        pairs = share.alignment[:, None, None, None] * torch.outer(signs, signs) / sigmas.shape[1]
        return cls(acting, pairs, kernel_rates(sigmas), share.positive, share.sparse, config)

    def __call__(self, model: Model, rows: Rows) -> Losses:
        """Of a batch of `rows`: A = T, N = M = 2B."""
        steered = Steered.of(model, rows, self.acting)
        kernels = gaussian(steered.distances, self.rates) * self.pairs
        on_positive, on_negative = self.positive * steered.gates, self.sparse * steered.gates
        ortho, turn = orthogonality(steered.among[:-1, :-1])
        terms = torch.stack([kernels.sum(), (on_positive * steered.gates).sum(), on_negative.sum(), ortho])

        slope = (kernels * self.rates[..., None, None]).sum(1)
        of_gates = torch.add(self.config.l_sparse * self.sparse, on_positive, alpha=2 * self.config.l_pos)
        return Losses(terms, _gradient(model, rows, steered, slope, of_gates, self.config.l_ortho * turn))


def _gradient(
    model: Model, rows: Rows, steered: Steered, slope: Tensor, of_gates: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the derivatives of the loss by the distances, `slope` [T, 2B, 2B]; by the gates, where they are penalised,
    `of_gates` [T, 2B, T]; and by the vectors, where they are, `turn` [T, T] @ V."""
    count = len(turn)
    # By the steered rows Y, seen from the origin, the derivative is z Y.
    z = 4 * (torch.diag_embed(slope.sum(-1)) - slope)
    products = z @ torch.cat([steered.shift, steered.reach, steered.norms], -1)
    of_rows = steered.scale * products[..., :count]
    of_shift = products[..., count + 1 : -1]
    of_moved = steered.scale * of_shift[..., :count]
    narrow = _flat(steered.shift)[:, :count].mT @ _flat(products)[:, : count + 1]
    narrow[:, :count] += turn
    if model.normalize:  # the scale falls as |n + g V| grows
        inner = products[..., -1:] / 2 + 2 * (slope * steered.distances).sum(-1, keepdim=True)
        fall = (inner + of_shift[..., count:]) / steered.squares[..., None]
        fallen = fall * steered.moved
        of_rows, of_moved = of_rows - fallen, of_moved - fall * steered.pull
        narrow -= _flat(fallen).mT @ _flat(torch.cat([steered.moved, torch.ones_like(fall)], -1))

    of_logits = (of_moved * steered.acting + of_gates) * (steered.gates - steered.gates.square())
    wide = _flat(torch.cat([of_rows, of_logits], -1)).mT @ _flat(rows.centred)
    biases = of_logits.sum((0, 1))
    weights = torch.addr(wide[count:], biases, model.frame.offset)
    return torch.addmm(wide[:count], narrow, steered.basis), weights, biases


def _flat(rows: Tensor) -> Tensor:
    return rows.flatten(0, 1)
