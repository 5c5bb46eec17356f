"""Attention heads by name, and a logistic probe of each: which heads tell the two sides apart on groups unseen by it.

"14.3" is head 3 of layer 14, a slice of the activations at site 14.attn_heads.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from training.data.samples import Split
from training.errors import FitError
from training.files import write_json
from training.methods.base import MethodConfig, option
from training.methods.probe import PENALTY_HELP, fit_logistic
from training.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations

_TOLERANCE = 1e-4  # a held-out sample more or less does not hang on further digits, and they cost most of the time


@dataclass(frozen=True, order=True)
class Head:
    """One attention head: the block with index `layer`, and the head's place among those of the block."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"

    @property
    def site(self) -> "Site":
        from steering.types import Site, SiteKind

        return Site(self.layer, SiteKind.ATTN_HEADS)

    def span(self, width: int) -> slice:
        """The head's dimensions at its site, where every head is `width` wide."""
        return slice(self.index * width, (self.index + 1) * width)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises FitError."""
        found = re.fullmatch(r"(\d+)\.(\d+)", text.strip(), re.ASCII)
        if found is None:
            raise FitError(f"A head is written LAYER.HEAD, as in 14.3, not {text!r}.")
        return cls(int(found[1]), int(found[2]))


def parse_heads(text: str) -> tuple[Head, ...]:
    """Heads separated by commas, each once, in order. Raises FitError."""
    return tuple(sorted({Head.parse(part) for part in text.split(",")}))


@dataclass(frozen=True)
class ProbingConfig(MethodConfig):
    """How heads are ranked (Li et al., 2023: training and validation 4 : 1)."""

    penalty: float = option(PENALTY_HELP, default=1.0, min=0)
    held_out: float = 0.2
    """Share of the train split's groups that the probes are validated on."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class HeadProbe:
    """What was found for one head."""

    head: Head
    accuracy: float
    """On the held-out groups."""
    weights: "Tensor"
    """[d], from negative to positive."""


@dataclass(frozen=True, eq=False)
class HeadFit:
    """What a method that acts on heads gives."""

    columns: tuple["Column", ...]
    probes: tuple[HeadProbe, ...]
    """Of all heads, most accurate first; none where the heads were named."""


def probe_heads(
    activations: "Activations",
    name: str,
    sites: Sequence["Site"],
    probing: ProbingConfig | None = None,
    *,
    progress: bool = False,
) -> tuple[HeadProbe, ...]:
    """A probe of every head at `sites` for attribute `name`, most accurate first (heads as accurate: in order).

    Fitted and validated within the train split, whole groups on one side. Raises FitError for sites that are not
    attn_heads, and where one part lacks a side of the attribute.
    """
    import torch

    probing = probing or ProbingConfig()
    heads = list(_heads_at(activations, sites))
    rows = activations.rows(attribute=name, split=Split.TRAIN)
    labels = activations.labels[rows]
    held = _held_out([activations.groups[row] for row in rows.tolist()], probing)
    if any(part.all() or not part.any() for part in (labels[held], labels[~held])):
        raise FitError(
            f"Attribute {name!r} has too few groups in train to hold some out: both parts need both of its sides."
        )
    found = []
    with progress_bar(f"probe {name}", len(heads), "heads", shown=progress) as advance:
        for head in heads:
            (kept,) = activations.without_sinks(head.site, rows)
            usable = torch.isin(rows, kept)
            own = activations.at(head.site)[rows[usable], head.span(activations.head_width(head.site))]
            found.append(_probe(head, own, labels[usable], held[usable], probing.penalty))
            advance(1)
    return tuple(sorted(found, key=lambda probe: -probe.accuracy))


def best_heads(probes: Sequence[HeadProbe], top: int) -> tuple[HeadProbe, ...]:
    """The first `top`. Raises FitError where there are fewer."""
    if top > len(probes):
        raise FitError(f"The {top} best heads were asked for, but there are {len(probes)} at these layers.")
    return tuple(probes[:top])


def write_accuracies(folder: Path | None, fits: Mapping[str, HeadFit]) -> None:
    """`heads.json`: of each attribute, the accuracy of every head's probe; nothing where none was fitted."""
    found = {name: {str(probe.head): probe.accuracy for probe in fit.probes} for name, fit in fits.items()}
    if folder and any(found.values()):
        write_json(folder / "heads.json", found)


def check_head_sites(sites: Sequence["Site"], method: str) -> None:
    """Raises FitError for a site that is not attn_heads."""
    from steering.types import SiteKind

    for site in sites:
        if site.kind is not SiteKind.ATTN_HEADS:
            raise FitError(f"{method} acts on attn_heads, where heads are apart, not at {site}.")


def _heads_at(activations: "Activations", sites: Sequence["Site"]) -> Iterator[Head]:
    for site in sites:
        width = activations.at(site).shape[1]
        for index in range(width // activations.head_width(site)):
            yield Head(site.layer, index)


def _held_out(groups: Sequence[str], probing: ProbingConfig) -> "Tensor":
    """Bool [rows]: which rows' groups are held out, at least one of them."""
    import torch

    names = sorted(set(groups))
    random.Random(probing.seed).shuffle(names)
    held = set(names[: max(1, round(probing.held_out * len(names)))])
    return torch.tensor([group in held for group in groups], dtype=torch.bool)


def _probe(head: Head, rows: "Tensor", labels: "Tensor", held: "Tensor", penalty: float) -> HeadProbe:
    centred = rows - rows[~held].mean(0)
    features = centred / centred[~held].square().mean().sqrt().clamp_min(1e-12)
    weights, bias = fit_logistic(features[~held], labels[~held], penalty=penalty, tolerance=_TOLERANCE)
    right = (features[held] @ weights + bias > 0) == labels[held]
    return HeadProbe(head, float(right.double().mean()), weights)
