"""Zero or mean ablation of attention heads, as linear columns: exact, and served like any other steering.

For a dimension i of an ablated head v = -e_i, w = e_i and b = -fill_i: the linear gate is a_i - fill_i, so multiplier 1
replaces a_i by fill_i and leaves the other dimensions as they are. A head of width d takes d columns of its site's D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from training.data.samples import Split
from training.errors import FitError
from training.methods.base import FitInputs, Method, option
from training.methods.heads import (
    Head,
    HeadFit,
    HeadProbe,
    ProbingConfig,
    best_heads,
    check_head_sites,
    parse_heads,
    probe_heads,
    write_accuracies,
)

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations


class Fill(StrEnum):
    """What an ablated head puts out."""

    ZERO = "zero"
    MEAN = "mean"
    """Its mean over the train split."""


@dataclass(frozen=True)
class HeadAblationConfig(ProbingConfig):
    top: int | None = option("so many heads, the best probed first; default of iti: 48.", default=None, min=1)
    heads: tuple[Head, ...] = option(
        "these heads, whatever their probes.", default=(), type=str, parse=parse_heads, metavar="LAYER.HEAD[,..]"
    )
    """Those that are ablated; none: the `top` whose probes are most accurate."""
    fill: Fill = option("what the heads put out; default: zero.", default=Fill.ZERO)

    def __post_init__(self) -> None:
        if self.heads and self.top is not None:
            raise FitError("head-ablation takes heads or the top so many, not both.")

    def named_sites(self) -> tuple["Site", ...]:
        return tuple(dict.fromkeys(head.site for head in self.heads))

    def as_dict(self) -> dict[str, Any]:
        if self.heads:
            return {"fill": self.fill.value, "heads": ", ".join(map(str, self.heads))}
        return {name: value for name, value in super().as_dict().items() if name != "heads"}


def fit(inputs: FitInputs, config: HeadAblationConfig) -> Sequence["Column"]:
    """Attribute by attribute, each at all its sites together; `heads.json` has every head's accuracy."""
    fits = {
        name: fit_head_ablation(inputs.activations, name, sites, config, progress=inputs.progress)
        for name, sites in inputs.by_attribute()
    }
    write_accuracies(inputs.folder, fits)
    return [column for found in fits.values() for column in found.columns]


def fit_head_ablation(
    activations: "Activations",
    name: str,
    sites: Sequence["Site"],
    config: HeadAblationConfig,
    *,
    progress: bool = False,
) -> HeadFit:
    """One column for each dimension of each head.

    Means are those of the train split, both sides. Raises FitError for heads that are not at `sites` (attn_heads), and
    without heads.
    """
    import torch

    check_head_sites(sites, "head-ablation")
    probes: tuple[HeadProbe, ...] = ()
    heads: Sequence[Head] = config.heads
    if not heads:
        if config.top is None:
            raise FitError("head-ablation needs the heads, or how many of the best probed ones.")
        probes = probe_heads(activations, name, sites, config, progress=progress)
        heads = sorted(probe.head for probe in best_heads(probes, config.top))
    rows = activations.rows(attribute=name, split=Split.TRAIN)
    columns: list[Column] = []
    for head in heads:
        if head.site not in sites:
            raise FitError(f"Head {head} was named, but {head.site} is not among the sites.")
        (usable,) = activations.without_sinks(head.site, rows)
        values = activations.at(head.site)[usable]
        fill = values.mean(0) if config.fill is Fill.MEAN else torch.zeros(values.shape[1])
        columns.extend(_columns(name, head, activations.head_width(head.site), fill))
    return HeadFit(tuple(columns), probes)


def _columns(name: str, head: Head, width: int, fill: "Tensor") -> Iterator["Column"]:
    import torch

    from steering.column import Column
    from steering.types import Gate

    span = head.span(width)
    if span.stop > len(fill):
        raise FitError(f"There is no head {head}: layer {head.layer} has {len(fill) // width} heads.")
    for i in range(span.start, span.stop):
        axis = torch.zeros(len(fill))
        axis[i] = 1.0
        yield Column(name, head.site, Gate.LINEAR, -axis, axis, -float(fill[i]), keep_norm=False)


HEAD_ABLATION = Method(
    name="head-ablation",
    summary="heads put out zero or their mean",
    title="zero or mean ablation of attention heads",
    config=HeadAblationConfig,
    fit=fit,
    site="attn_heads",
    keep_norm=None,
    contrastive=False,
    layer_options=("heads",),
    one_place=False,
)
