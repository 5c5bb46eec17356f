"""Control vectors (representation engineering, arXiv 2310.01405; repeng): one attribute, a vector at every layer.

A vector points along the difference of the two sides' means, or along the first principal component of the groups'
differences (mean of the positives - mean of the negatives of one question, pair, ...). The component is taken about 0,
as if every difference were there with both signs: centred, what all differences share would be lost.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from training.activations import Pool
from training.data.samples import Split
from training.errors import FitError, TrainingError
from training.methods.base import Direction, FitInputs, Method, MethodConfig, option, parse_settings

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations, Contrast

log = logging.getLogger(__name__)


class Scale(StrEnum):
    """How long a control vector is at coefficient 1."""

    DIFFERENCE = "difference"
    """As far as the two sides' means lie apart along it."""
    UNIT = "unit"
    """1, as repeng's."""
    NORM = "norm"
    """The mean norm of the layer's activations."""


def _parse_coefficients(given: Sequence[str]) -> dict[int, float]:
    settings = parse_settings(given, "--coefficient")
    if wrong := [name for name in settings if not (name.isascii() and name.isdigit())]:
        raise TrainingError(f"--coefficient must be LAYER=NUMBER, as in 12=0.5, got layer {wrong[0]!r}.")
    return {int(layer): value for layer, value in settings.items()}


@dataclass(frozen=True)
class ControlConfig(MethodConfig):
    direction: Direction = option("mean or pca; default: mean.", default=Direction.MEAN)
    scale: Scale = option(
        "length at coefficient 1: how far the sides lie apart, 1, or the mean norm.", default=Scale.DIFFERENCE
    )
    coefficient: Mapping[int, float] = option(
        "factor on a layer's vector; default: 1. Repeat for more.",
        default_factory=dict,
        type=list[str],
        parse=_parse_coefficients,
        metavar="LAYER=X",
    )

    def __post_init__(self) -> None:
        if self.direction not in (Direction.MEAN, Direction.PCA):
            raise FitError(f"The direction of control is mean or pca, not {self.direction}.")

    def as_dict(self) -> dict[str, str | float]:
        named = {f"coefficient {layer}": value for layer, value in self.coefficient.items()}
        return {"direction": self.direction.value, "scale": self.scale.value, **named}


def fit(inputs: FitInputs, config: ControlConfig) -> Sequence["Column"]:
    """Attribute by attribute, each at all its sites together."""
    return [
        column
        for name, sites in inputs.by_attribute()
        for column in fit_control(inputs.activations, name, sites, config, normalize=inputs.keep_norm)
    ]


def fit_control(
    activations: "Activations",
    name: str,
    sites: Sequence["Site"],
    config: ControlConfig | None = None,
    *,
    normalize: bool = False,
) -> tuple["Column", ...]:
    """One ungated column at each of `sites`: coefficient * length * direction, from negative to positive.

    Raises FitError for a coefficient of a layer that is not among the sites, and for `pca` where no group has both
    sides.
    """
    import torch

    from steering.column import Column
    from steering.types import Gate

    config = config or ControlConfig()
    layers = {site.layer for site in sites}
    if unknown := sorted(set(config.coefficient) - layers):
        raise FitError(f"A coefficient names layer {unknown[0]}; the layers are {', '.join(map(str, sorted(layers)))}.")
    columns = []
    for site in sites:
        vector = config.coefficient.get(site.layer, 1.0) * control_vector(activations, name, site, config)
        columns.append(Column(name, site, Gate.CONSTANT, vector, torch.zeros_like(vector), 0.0, normalize))
    return tuple(columns)


def control_vector(activations: "Activations", name: str, site: "Site", config: ControlConfig) -> "Tensor":
    """[D]: length * direction, as the config says, at one site."""
    from torch.nn.functional import normalize as unit

    contrast = activations.contrasts(site, Split.TRAIN, [name])[name]
    difference = contrast.positive.mean(0) - contrast.negative.mean(0)
    direction = unit(difference, dim=0)
    if config.direction is Direction.PCA:
        direction = principal(group_differences(activations, name, site))
        direction = direction if direction @ difference >= 0 else -direction
    return _length(config.scale, contrast, float(difference @ direction)) * direction


def group_differences(activations: "Activations", name: str, site: "Site") -> "Tensor":
    """[G, D]: for each group of the train split with both sides, the mean of its positives - that of its negatives.

    Raises FitError where there is none.
    """
    import torch

    values, sides = activations.at(site), (True, False)
    rows: dict[str, dict[bool, list[int]]] = {}
    (usable,) = activations.without_sinks(site, activations.rows(attribute=name, split=Split.TRAIN))
    for row in usable.tolist():
        group = rows.setdefault(activations.groups[row], {side: [] for side in sides})
        group[bool(activations.labels[row])].append(row)
    pairs = [group for group in rows.values() if all(group.values())]
    if not pairs:
        raise FitError(f"No group of attribute {name!r} has both a positive and a negative: pca needs pairs.")
    if len(pairs) < len(rows):
        log.warning("%d of %d groups of %r have one side only: pca is without them.", len(rows) - len(pairs),
                    len(rows), name)  # fmt: skip
    return torch.stack([values[group[True]].mean(0) - values[group[False]].mean(0) for group in pairs])


def principal(differences: "Tensor") -> "Tensor":
    """The unit vector [D] along which the rows [G, D] are largest in sum of squares."""
    import torch

    _, _, basis = torch.linalg.svd(differences.double(), full_matrices=False)
    principal: Tensor = basis[0].to(differences.dtype)
    return principal


def _length(scale: Scale, contrast: "Contrast", along: float) -> float:
    import torch

    if scale is Scale.UNIT:
        return 1.0
    if scale is Scale.NORM:
        return float(torch.cat([contrast.positive, contrast.negative]).norm(dim=1).mean())
    return along


CONTROL = Method(
    name="control",
    summary="control vector over many layers",
    title="control vector over many layers (arXiv 2310.01405, repeng)",
    config=ControlConfig,
    fit=fit,
    site="residual",
    pool=Pool.LAST,
    layer_options=("coefficient",),
    one_place=False,
)
