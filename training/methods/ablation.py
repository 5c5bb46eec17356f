"""Directional ablation (Arditi et al., 2024, arXiv 2406.11717): an activation loses its part along one direction.

The direction r is the unit difference of the two sides' means at one site. Every column has v = -r and the linear gate
r . a, so multiplier 1 gives a - r (r . a), and multiplier -1 doubles the part along r. To keep the direction out of the
whole residual stream, ablate it at every layer and at all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.activations import Pool
from training.data.samples import Split
from training.errors import FitError, TrainingError
from training.methods.base import FitInputs, Method, MethodConfig, option

if TYPE_CHECKING:
    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations


def _parse_source(given: str) -> "Site":
    from steering.errors import SteeringError
    from steering.types import Site

    try:
        return Site.parse(given)
    except SteeringError:
        raise TrainingError(f"--source must be LAYER.SITE, as in 12.residual, got {given!r}.") from None


@dataclass(frozen=True)
class AblationConfig(MethodConfig):
    source: "Site | None" = option(
        "where the direction is measured that is removed at every site.",
        default=None,
        type=str,
        parse=_parse_source,
        metavar="LAYER.SITE",
    )
    """None: where it is ablated, at one site."""

    def extra_sites(self) -> tuple["Site", ...]:
        return () if self.source is None else (self.source,)

    def as_dict(self) -> dict[str, str | None]:
        return {"source": None if self.source is None else str(self.source)}


def fit(inputs: FitInputs, config: AblationConfig) -> Sequence["Column"]:
    """Attribute by attribute, each at all its sites together."""
    return [
        column
        for name, sites in inputs.by_attribute()
        for column in fit_ablation(inputs.activations, name, sites, config)
    ]


def fit_ablation(
    activations: "Activations", name: str, sites: Sequence["Site"], config: AblationConfig | None = None
) -> tuple["Column", ...]:
    """One column at each of `sites`, all with the direction of attribute `name` at the source.

    Raises FitError for several sites without a source, and at attn_heads, where there is no residual stream.
    """
    from torch.nn.functional import normalize as unit

    from steering.column import Column
    from steering.types import Gate, SiteKind

    source = config.source if config else None
    if source is None and len(sites) > 1:
        raise FitError("ablation at several sites needs a source, the one site where the direction is measured.")
    source = source or sites[0]
    for site in (source, *sites):
        if site.kind is SiteKind.ATTN_HEADS:
            raise FitError(f"ablation acts on the residual stream and what is added to it, not at {site}.")
    contrast = activations.contrasts(source, Split.TRAIN, [name])[name]
    direction = unit(contrast.positive.mean(0) - contrast.negative.mean(0), dim=0)
    if not direction.any():
        raise FitError(f"The two sides of attribute {name!r} have the same mean at {source}: there is no direction.")
    return tuple(Column(name, site, Gate.LINEAR, -direction, direction, 0.0, keep_norm=False) for site in sites)


ABLATION = Method(
    name="ablation",
    summary="directional ablation",
    title="directional ablation (arXiv 2406.11717)",
    config=AblationConfig,
    fit=fit,
    site="residual",
    pool=Pool.LAST,
    keep_norm=None,
    one_place=False,
)
