"""Linear probe direction: the unit normal of a logistic probe, scaled by the activations' standard deviation on it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from steering.types import Column, Gate, Site
from training.activations.store import Contrast
from training.methods.logistic import fit_logistic


def fit_probe(
    contrasts: Mapping[str, Contrast], site: Site, *, penalty: float = 1.0, normalize: bool = False
) -> tuple[Column, ...]:
    """One ungated column an attribute: positive against negative, `penalty` on the squared weights of the probe."""
    return tuple(_column(name, site, contrast, penalty, normalize) for name, contrast in contrasts.items())


def probe_direction(contrast: Contrast, penalty: float = 1.0) -> Tensor:
    """The unit vector [D] along which a logistic probe finds an activation more positive."""
    rows = torch.cat([contrast.positive, contrast.negative])
    targets = torch.cat([torch.ones(len(contrast.positive)), torch.zeros(len(contrast.negative))])
    centred = rows - rows.mean(0)
    scale = centred.square().mean().sqrt().clamp_min(1e-12)
    weights, _ = fit_logistic(centred / scale, targets.to(rows.device), penalty=penalty)
    return torch.nn.functional.normalize(weights, dim=0)


def _column(name: str, site: Site, contrast: Contrast, penalty: float, normalize: bool) -> Column:
    direction = probe_direction(contrast, penalty)
    deviation = (torch.cat([contrast.positive, contrast.negative]) @ direction).std()
    return Column(
        attribute=name,
        site=site,
        gate=Gate.CONSTANT,
        vector=deviation * direction,
        gate_weight=torch.zeros_like(direction),
        gate_bias=0.0,
        keep_norm=normalize,
    )
