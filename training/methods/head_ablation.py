"""Zero or mean ablation of attention heads, as linear columns: exact, and served like any other steering.

For a dimension i of an ablated head v = -e_i, w = e_i and b = -fill_i: the linear gate is a_i - fill_i, so multiplier 1
replaces a_i by fill_i and leaves the other dimensions as they are. A head of width d takes d columns of its site's D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steering.types import Column, Gate, Site
from training.activations.store import Activations
from training.choices import Fill
from training.data.samples import Split
from training.errors import FitError
from training.methods.heads import Head, HeadFit, HeadProbe, Probing, best_heads, check_head_sites, probe_heads


@dataclass(frozen=True)
class HeadAblationConfig:
    heads: tuple[Head, ...] = ()
    """Those that are ablated; none: the `top` whose probes are most accurate."""
    top: int | None = None
    fill: Fill = Fill.ZERO
    probing: Probing = field(default_factory=Probing)

    def __post_init__(self) -> None:
        if self.heads and self.top is not None:
            raise FitError("head-ablation takes heads or the top so many, not both.")

    def as_dict(self) -> dict[str, str | int | float | None]:
        chosen: dict[str, str | int | float | None] = {"fill": self.fill.value}
        if self.heads:
            return chosen | {"heads": ", ".join(map(str, self.heads))}
        return chosen | {"top": self.top, **self.probing.as_dict()}


def fit_head_ablation(
    activations: Activations,
    name: str,
    sites: Sequence[Site],
    config: HeadAblationConfig,
    *,
    progress: bool = False,
) -> HeadFit:
    """One column for each dimension of each head.

    Means are those of the train split, both sides. Raises FitError for heads that are not at `sites` (attn_heads), and
    without heads.
    """
    check_head_sites(sites, "head-ablation")
    probes: tuple[HeadProbe, ...] = ()
    heads: Sequence[Head] = config.heads
    if not heads:
        if config.top is None:
            raise FitError("head-ablation needs the heads, or how many of the best probed ones.")
        probes = probe_heads(activations, name, sites, config.probing, progress=progress)
        heads = sorted(probe.head for probe in best_heads(probes, config.top))
    rows = activations.rows(attribute=name, split=Split.TRAIN)
    columns: list[Column] = []
    for head in heads:
        if head.site not in sites:
            raise FitError(f"Head {head} was named, but {head.site} is not among the sites.")
        values = activations.at(head.site)[rows]
        fill = values.mean(0) if config.fill is Fill.MEAN else torch.zeros(values.shape[1])
        columns.extend(_columns(name, head, activations.head_width(head.site), fill))
    return HeadFit(tuple(columns), probes)


def _columns(name: str, head: Head, width: int, fill: Tensor) -> Iterator[Column]:
    span = head.span(width)
    if span.stop > len(fill):
        raise FitError(f"There is no head {head}: layer {head.layer} has {len(fill) // width} heads.")
    for i in range(span.start, span.stop):
        axis = torch.zeros(len(fill))
        axis[i] = 1.0
        yield Column(name, head.site, Gate.LINEAR, -axis, axis, -float(fill[i]), keep_norm=False)
