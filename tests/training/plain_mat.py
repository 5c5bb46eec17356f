"""The losses of MAT-Steer as the paper writes them (arXiv 2502.12446), in loops, for autograd to differentiate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.methods.mat import MatConfig, Objective


@dataclass(frozen=True, eq=False)
class Plain:
    """Vectors [T, D], gate weights [T, D] and biases [T], in units of each attribute's `ratios` [T, 1]; gates see
    activations less their `centres` [T, D]."""

    vectors: Tensor
    weights: Tensor
    biases: Tensor
    centres: Tensor
    ratios: Tensor
    config: MatConfig

    def gate(self, row: Tensor, t: int) -> Tensor:
        return torch.sigmoid(self.weights[t] @ (row - self.centres[t]) / self.ratios[t, 0] + self.biases[t])

    def steer(self, row: Tensor, own: int) -> Tensor:
        acting = range(len(self.vectors)) if self.config.joint else [own]
        steered = row + torch.stack([self.gate(row, t) * self.vectors[t] * self.ratios[t] for t in acting]).sum(0)
        return steered * row.norm() / steered.norm() if self.config.normalize else steered

    def losses(self, positive: Tensor, negative: Tensor, sigmas: Tensor, unsteered: Tensor) -> Tensor:
        """[5]: the weighted sum and its terms, for sides [T, B, D], `sigmas` [T, K] and `unsteered` [T]."""
        count, batch = len(self.vectors), positive.shape[1]
        mmds = []
        for t in range(count):
            steered = [self.steer(row, t) for row in negative[t]]
            mmds.append(plain_mmd2(list(positive[t]), steered, sigmas[t]))
        every = [(data, row, t) for data in range(count) for row in range(batch) for t in range(count)]
        own = [(data, row, t) for data, row, t in every if data == t]
        objective = self.config.objective
        counted = every if objective is Objective.REFERENCE else own
        l_pos = torch.stack([self.gate(positive[data, row], t) ** 2 for data, row, t in counted]).sum()
        l_sparse = torch.stack([self.gate(negative[data, row], t).abs() for data, row, t in counted]).sum()
        if objective is Objective.REFERENCE:
            mmd, l_pos, l_sparse = torch.stack(mmds).mean(), l_pos / len(every), l_sparse / len(every)
        elif objective is Objective.BALANCED:
            mmd, l_pos, l_sparse = (torch.stack(mmds) / unsteered).sum(), l_pos / batch, l_sparse / batch
        else:
            mmd = torch.stack(mmds).sum()
        l_ortho = torch.zeros(()).to(self.vectors)
        for i in range(count):
            for j in range(i):
                l_ortho = l_ortho + torch.cosine_similarity(self.vectors[i], self.vectors[j], dim=0) ** 2
        c = self.config
        total = mmd + c.l_pos * l_pos + c.l_sparse * l_sparse + c.l_ortho * l_ortho
        return torch.stack([total, mmd, l_pos, l_sparse, l_ortho])


def plain_mmd2(x: list[Tensor], y: list[Tensor], sigmas: Tensor) -> Tensor:
    def kernel(a: list[Tensor], b: list[Tensor]) -> Tensor:
        values = [torch.exp(-(p - q).square().sum() / (2 * s**2)) for p in a for q in b for s in sigmas]
        return torch.stack(values).mean()

    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
