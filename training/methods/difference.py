"""Difference in means: mean(positive) - mean(negative) (ActAdd, arXiv 2308.10248; CAA, arXiv 2312.06681)."""

from collections.abc import Mapping

import torch

from steering.types import Column, Gate, Site
from training.activations.store import Contrast


def fit_difference(contrasts: Mapping[str, Contrast], site: Site, *, normalize: bool = False) -> tuple[Column, ...]:
    """One ungated column an attribute; `normalize` keeps the activation's norm when it is added."""
    return tuple(
        Column(
            attribute=name,
            site=site,
            gate=Gate.CONSTANT,
            vector=contrast.positive.mean(0) - contrast.negative.mean(0),
            gate_weight=torch.zeros(contrast.positive.shape[1]),
            gate_bias=0.0,
            keep_norm=normalize,
        )
        for name, contrast in contrasts.items()
    )
