"""Difference in means: mean(positive) - mean(negative) (ActAdd, arXiv 2308.10248; CAA, arXiv 2312.06681)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.data.samples import Split
from training.methods.base import FitInputs, Method, MethodConfig

if TYPE_CHECKING:
    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Contrast


@dataclass(frozen=True)
class CaaConfig(MethodConfig):
    """There is nothing to set."""


def fit(inputs: FitInputs, config: MethodConfig) -> Sequence["Column"]:
    """Site by site, attribute by attribute."""
    columns: list[Column] = []
    for site, names in inputs.by_site():
        contrasts = inputs.activations.contrasts(site, Split.TRAIN, names)
        columns += fit_difference(contrasts, site, normalize=inputs.keep_norm)
    return columns


def fit_difference(
    contrasts: Mapping[str, "Contrast"], site: "Site", *, normalize: bool = False
) -> tuple["Column", ...]:
    """One ungated column an attribute; `normalize` keeps the activation's norm when it is added."""
    import torch

    from steering.column import Column
    from steering.types import Gate

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


CAA = Method(
    name="caa",
    summary="difference in means",
    title="difference in means (arXiv 2308.10248, 2312.06681)",
    config=CaaConfig,
    fit=fit,
)
