"""Each attribute's alignment and gates, measured after every epoch on the same rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from training.activations.store import Contrast
from training.methods.losses import gaussian, kernel_rates, mmd2, squared_distances
from training.methods.mat_data import Frame, Rows, squared_norms
from training.methods.mat_log import Side
from training.methods.mat_model import Model
from training.methods.mat_steered import Steered

_ROWS = 512


@dataclass(frozen=True, eq=False)
class Watched:
    """One attribute on one split: (at most 512 + 512 of) its rows, and what of them no training changes."""

    rows: Rows  # A = 1: P positives, then the negatives; `gram` is with the negatives
    positives: int  # P
    within: Tensor  # [], the mean kernel between positives
    unsteered: Tensor  # [], MMD^2 without steering, never 0
    acting: Tensor  # [1, P + N, T]: 1 where a gate acts
    rates: Tensor  # [1, K], of the kernels

    @classmethod
    def of(cls, contrast: Contrast, frame: Frame, sigmas: Tensor, acting: Tensor) -> Self:
        """`contrast` is in the frame's units, `acting` [T] says which gates steer it."""
        positive, negative, rates = _thin(contrast.positive)[None], _thin(contrast.negative)[None], kernel_rates(sigmas)
        count, centred = positive.shape[1], torch.cat([positive, negative], 1)
        norms, squares = squared_norms(centred, frame.origin).unbind(-1)
        rows = Rows(centred, norms, squares, centred @ negative.mT)
        apart = squared_distances(positive @ positive.mT, norms[:, :count], norms[:, :count])
        within = gaussian(apart, rates[None]).mean()
        unsteered = mmd2(positive, negative, sigmas[None])[0].clamp_min(1e-6)
        side = (torch.arange(centred.shape[1], device=acting.device) >= count).to(acting)
        return cls(rows, count, within, unsteered, side[:, None] * acting, rates[None])

    def side(self, model: Model, index: int) -> Side:
        """`index` is that of the attribute's own gate."""
        steered, count = Steered.of(model, self.rows, self.acting), self.positives
        kernel = gaussian(steered.distances, self.rates)
        mmd = self.within + kernel[:, :, count:].mean() - 2 * kernel[:, :, :count].mean()
        own = steered.gates[0, :, index]
        numbers = torch.stack([mmd / self.unsteered, own[:count].mean(), own[count:].mean()])
        return Side(*numbers.tolist())


def watch(contrasts: Mapping[str, Contrast], frame: Frame, sigmas: Tensor, joint: bool) -> dict[str, Watched]:
    """A split's attributes, given in the frame's units, with their `sigmas` [T, K]."""
    acting = torch.ones(len(sigmas), len(sigmas)) if joint else torch.eye(len(sigmas))
    return {
        name: Watched.of(contrast, frame, sigmas[index], acting[index].to(sigmas))
        for index, (name, contrast) in enumerate(contrasts.items())
    }


@torch.inference_mode()
def inspect(model: Model, watched: Mapping[str, Watched]) -> dict[str, Side]:
    return {name: one.side(model, index) for index, (name, one) in enumerate(watched.items())}


def _thin(rows: Tensor) -> Tensor:
    """Evenly spread rows, few enough for a full kernel matrix."""
    return rows[:: max(1, -(-len(rows) // _ROWS))]
