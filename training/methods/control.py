"""Control vectors (representation engineering, arXiv 2310.01405; repeng): one attribute, a vector at every layer.

A vector points along the difference of the two sides' means, or along the first principal component of the groups'
differences (mean of the positives - mean of the negatives of one question, pair, ...). The component is taken about 0,
as if every difference were there with both signs: centred, what all differences share would be lost.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

from steering.types import Column, Gate, Site
from training.activations.store import Activations, Contrast
from training.choices import Direction, Scale
from training.data.samples import Split
from training.errors import FitError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlConfig:
    direction: Direction = Direction.MEAN
    scale: Scale = Scale.DIFFERENCE
    coefficients: Mapping[int, float] = field(default_factory=dict)
    """Layer -> factor on its vector, 1 where it is not named."""

    def __post_init__(self) -> None:
        if self.direction not in (Direction.MEAN, Direction.PCA):
            raise FitError(f"The direction of control is mean or pca, not {self.direction}.")

    def as_dict(self) -> dict[str, str | float]:
        named = {f"coefficient {layer}": value for layer, value in self.coefficients.items()}
        return {"direction": self.direction.value, "scale": self.scale.value, **named}


def fit_control(
    activations: Activations,
    name: str,
    sites: Sequence[Site],
    config: ControlConfig | None = None,
    *,
    normalize: bool = False,
) -> tuple[Column, ...]:
    """One ungated column at each of `sites`: coefficient * length * direction, from negative to positive.

    Raises FitError for a coefficient of a layer that is not among the sites, and for `pca` where no group has both
    sides.
    """
    config = config or ControlConfig()
    layers = {site.layer for site in sites}
    if unknown := sorted(set(config.coefficients) - layers):
        raise FitError(f"A coefficient names layer {unknown[0]}; the layers are {', '.join(map(str, sorted(layers)))}.")
    columns = []
    for site in sites:
        vector = config.coefficients.get(site.layer, 1.0) * _vector(activations, name, site, config)
        columns.append(Column(name, site, Gate.CONSTANT, vector, torch.zeros_like(vector), 0.0, normalize))
    return tuple(columns)


def _vector(activations: Activations, name: str, site: Site, config: ControlConfig) -> Tensor:
    contrast = activations.contrasts(site, Split.TRAIN, [name])[name]
    difference = contrast.positive.mean(0) - contrast.negative.mean(0)
    direction = unit(difference, dim=0)
    if config.direction is Direction.PCA:
        direction = _principal(group_differences(activations, name, site))
        direction = direction if direction @ difference >= 0 else -direction
    return _length(config.scale, contrast, float(difference @ direction)) * direction


def group_differences(activations: Activations, name: str, site: Site) -> Tensor:
    """[G, D]: for each group of the train split with both sides, the mean of its positives - that of its negatives.

    Raises FitError where there is none.
    """
    values, sides = activations.at(site), (True, False)
    rows: dict[str, dict[bool, list[int]]] = {}
    for row in activations.rows(attribute=name, split=Split.TRAIN).tolist():
        group = rows.setdefault(activations.groups[row], {side: [] for side in sides})
        group[bool(activations.labels[row])].append(row)
    pairs = [group for group in rows.values() if all(group.values())]
    if not pairs:
        raise FitError(f"No group of attribute {name!r} has both a positive and a negative: pca needs pairs.")
    if len(pairs) < len(rows):
        log.warning("%d of %d groups of %r have one side only: pca is without them.", len(rows) - len(pairs),
                    len(rows), name)  # fmt: skip
    return torch.stack([values[group[True]].mean(0) - values[group[False]].mean(0) for group in pairs])


def _principal(differences: Tensor) -> Tensor:
    """The unit vector [D] along which the rows [G, D] are largest in sum of squares."""
    _, _, basis = torch.linalg.svd(differences.double(), full_matrices=False)
    principal: Tensor = basis[0].to(differences.dtype)
    return principal


def _length(scale: Scale, contrast: Contrast, along: float) -> float:
    if scale is Scale.UNIT:
        return 1.0
    if scale is Scale.NORM:
        return float(torch.cat([contrast.positive, contrast.negative]).norm(dim=1).mean())
    return along
