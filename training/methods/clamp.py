"""Clamping: an activation's projection on a direction is set to a value, whatever it was, as features of sparse
autoencoders are clamped (transformer-circuits.pub/2024/scaling-monosemanticity). With the value 0 this is directional
ablation (arXiv 2406.11717).

The direction is the unit difference of the two sides' means. The projection is counted from the middle between them:
multiplier 1 sets it to the positive side's mean, -1 to the negative side's, 2 goes twice as far from the middle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.data.samples import Split
from training.errors import FitError
from training.methods.base import FitInputs, Method, MethodConfig

if TYPE_CHECKING:
    from steering.column import Column


@dataclass(frozen=True)
class ClampConfig(MethodConfig):
    """There is nothing to set."""


def fit(inputs: FitInputs, config: ClampConfig) -> Sequence["Column"]:
    """Site by site, attribute by attribute: one column each. Raises FitError."""
    import torch
    from torch.nn.functional import normalize as unit

    from steering.column import Column
    from steering.types import Clamp, Gate

    columns: list[Column] = []
    for site, names in inputs.by_site():
        for name, sides in inputs.activations.contrasts(site, Split.TRAIN, names).items():
            means = torch.stack([side.double().mean(0) for side in (sides.positive, sides.negative)])
            direction = unit(means[0] - means[1], dim=0)
            if not direction.any():
                raise FitError(
                    f"The two sides of attribute {name!r} have the same mean at {site}: there is no direction."
                )
            high, low = (means @ direction).tolist()
            clamp = Clamp((high - low) / 2, (high + low) / 2)
            vector = direction.float()
            columns.append(
                Column(name, site, Gate.CONSTANT, vector, torch.zeros_like(vector), 0.0, inputs.keep_norm, clamp=clamp)
            )
    return columns


CLAMP = Method(
    name="clamp",
    summary="projection on the difference in means, set to a value",
    title="clamping of the projection on the difference in means (arXiv 2406.11717)",
    config=ClampConfig,
    fit=fit,
    site="residual",
)
