"""Inference-time intervention (Li et al., 2023, arXiv 2306.03341): shifts of the heads that tell most.

Of all heads given, the K whose probes are most accurate are moved at every steered token by alpha * sigma * direction:
`direction` is the unit difference of the two sides' means (or the unit weights of the probe), sigma the standard
deviation of the head's activations along it, and alpha the multiplier (the paper's, for LLaMA-7B: K 48, alpha 15).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.activations import Pool
from training.data.samples import Split
from training.errors import FitError
from training.methods.base import Direction, FitInputs, Method, option
from training.methods.heads import (
    HeadFit,
    HeadProbe,
    ProbingConfig,
    best_heads,
    check_head_sites,
    probe_heads,
    write_accuracies,
)

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations, Contrast

PUBLISHED_TOP = 48


@dataclass(frozen=True)
class ItiConfig(ProbingConfig):
    top: int | None = option("so many heads, the best probed first; default of iti: 48.", default=None, min=1)
    """K; None: 48, or all heads where there are fewer."""
    direction: Direction = option("mean or probe; default: mean.", default=Direction.MEAN)

    def __post_init__(self) -> None:
        if self.direction not in (Direction.MEAN, Direction.PROBE):
            raise FitError(f"The direction of iti is mean or probe, not {self.direction}.")


def fit(inputs: FitInputs, config: ItiConfig) -> Sequence["Column"]:
    """Attribute by attribute, each at all its sites together; `heads.json` has every head's accuracy."""
    fits = {
        name: fit_iti(inputs.activations, name, sites, config, normalize=inputs.keep_norm, progress=inputs.progress)
        for name, sites in inputs.by_attribute()
    }
    write_accuracies(inputs.folder, fits)
    return [column for found in fits.values() for column in found.columns]


def fit_iti(
    activations: "Activations",
    name: str,
    sites: Sequence["Site"],
    config: ItiConfig | None = None,
    *,
    normalize: bool = False,
    progress: bool = False,
) -> HeadFit:
    """One ungated column for each of `sites` (attn_heads) that has a head among the K best.

    Directions and deviations are those of the whole train split. Raises FitError.
    """
    import torch

    from steering.column import Column
    from steering.types import Gate

    config = config or ItiConfig()
    check_head_sites(sites, "iti")
    probes = probe_heads(activations, name, sites, config, progress=progress)
    chosen = best_heads(probes, config.top or min(PUBLISHED_TOP, len(probes)))
    columns = []
    for site in sites:
        own = [probe for probe in chosen if probe.head.site == site]
        if own:
            contrast = activations.contrasts(site, Split.TRAIN, [name])[name]
            vector = _shifts(contrast, own, activations.head_width(site), config.direction)
            columns.append(Column(name, site, Gate.CONSTANT, vector, torch.zeros_like(vector), 0.0, normalize))
    return HeadFit(tuple(columns), probes)


def _shifts(contrast: "Contrast", chosen: Sequence[HeadProbe], width: int, direction: Direction) -> "Tensor":
    """[D]: sigma * direction in the slice of every chosen head, 0 elsewhere."""
    import torch
    from torch.nn.functional import normalize as unit

    shifts = torch.zeros(contrast.positive.shape[1])
    for probe in chosen:
        span = probe.head.span(width)
        positive, negative = contrast.positive[:, span], contrast.negative[:, span]
        towards = probe.weights if direction is Direction.PROBE else positive.mean(0) - negative.mean(0)
        along = unit(towards, dim=0)
        shifts[span] = (torch.cat([positive, negative]) @ along).std(correction=0) * along
    return shifts


ITI = Method(
    name="iti",
    summary="inference-time intervention",
    title="inference-time intervention on the most telling heads (arXiv 2306.03341)",
    config=ItiConfig,
    fit=fit,
    site="attn_heads",
    pool=Pool.LAST,
    multiplier=15.0,
    one_place=False,
)
