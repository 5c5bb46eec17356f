"""Activations with a structure that a method has to find."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steering import Site, SiteKind
from training.activations.store import Activations
from training.data.samples import Split

NAME = "truth"
HEADS, HEAD_WIDTH = 4, 8


def labelled(
    values: Mapping[Site, Tensor], labels: Tensor, groups: Sequence[str] | None = None, *, heads: int | None = HEADS
) -> Activations:
    """One attribute, all rows in train; every row a group of its own unless `groups` says otherwise."""
    count = len(labels)
    return Activations(
        values=values,
        attributes=(NAME,) * count,
        labels=labels,
        groups=tuple(groups or map(str, range(count))),
        splits=(Split.TRAIN,) * count,
        samples=torch.arange(count),
        source={} if heads is None else {"heads": heads},
    )


def with_directions(directions: Mapping[Site, Tensor], *, count: int = 400, shift: float = 3.0) -> Activations:
    """Unit normal noise, and the two sides `shift` apart along each site's direction [D] (a zero one: no difference).

    Every two rows make a group with both sides.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2 == 0
    signs = torch.where(labels, 0.5, -0.5)[:, None] * shift
    values = {
        site: torch.randn(count, len(direction), generator=generator) + signs * direction
        for site, direction in directions.items()
    }
    return labelled(values, labels, [str(row // 2) for row in range(count)])


def unit_vector(width: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


def heads_site(layer: int) -> Site:
    return Site(layer, SiteKind.ATTN_HEADS)


def in_head(index: int, direction: Tensor) -> Tensor:
    """`direction` [d] in one head's slice, 0 elsewhere: [heads * d]."""
    placed = torch.zeros(HEADS, len(direction))
    placed[index] = direction
    return placed.flatten()
