"""The activations that MAT-Steer trains on, in the units of the training, and the batches of an epoch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from training.activations.store import Contrast


@dataclass(frozen=True, eq=False)
class Frame:
    """The units of the training: activations divided by `scale`, seen from an `origin` [D] amid them; gates see them
    less `centre` [D]."""

    scale: float
    origin: Tensor
    centre: Tensor

    @classmethod
    def of(cls, contrasts: Mapping[str, Contrast], standardize: bool, device: str | torch.device = "cpu") -> Self:
        """Without `standardize`, the scale is 1 and gates see the activations as they are."""
        sides = [side.float() for contrast in contrasts.values() for side in (contrast.positive, contrast.negative)]
        middle = torch.stack([side.mean(0) for side in sides]).mean(0)
        if not standardize:
            return cls(1.0, middle.to(device), torch.zeros_like(middle, device=device))
        spread = torch.stack([(side - middle).square().mean() for side in sides]).mean().sqrt()
        scale = float(spread.clamp_min(1e-12))
        origin = (middle / scale).to(device)
        return cls(scale, origin, origin)

    @property
    def offset(self) -> Tensor:
        """What gates see of the origin, [D]."""
        return self.origin - self.centre

    def apply(self, side: Tensor) -> Tensor:
        """Activations [N, D] in these units, on the frame's device."""
        return side.float().to(self.origin.device) / self.scale - self.origin


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of each of A attributes, as the losses need them."""

    centred: Tensor
    """[A, N, D], less the origin."""
    norms: Tensor
    """[A, N], squared, of `centred`."""
    squares: Tensor
    """[A, N], squared norms of the rows with the origin."""
    gram: Tensor
    """[A, N, M], the inner products of `centred` with its last M rows; M = N in a training step."""


@dataclass(frozen=True, eq=False)
class Table:
    """All rows of all attributes."""

    centred: Tensor
    """[M, D], less the origin."""
    squares: Tensor
    """[M, 2], squared norms of the rows without and with the origin."""
    sides: Mapping[str, tuple[range, range]]
    """Of each attribute, where its positives and its negatives are."""

    @classmethod
    def of(cls, contrasts: Mapping[str, Contrast], frame: Frame) -> Self:
        sides, parts, end = {}, [], 0
        for name, contrast in contrasts.items():
            parts += [frame.apply(contrast.positive), frame.apply(contrast.negative)]
            middle = end + len(contrast.positive)
            sides[name] = range(end, middle), range(middle, middle + len(contrast.negative))
            end = sides[name][1].stop
        centred = torch.cat(parts)
        return cls(centred, squared_norms(centred, frame.origin), sides)

    def contrasts(self) -> dict[str, Contrast]:
        """Of each attribute its two sides, in the frame's units."""
        return {
            name: Contrast(*(self.centred[side.start : side.stop] for side in sides))
            for name, sides in self.sides.items()
        }

    def rows(self, index: Tensor) -> Rows:
        """Those of `index` [A, N]."""
        chosen = self.centred.index_select(0, index.flatten()).view(*index.shape, -1)
        norms, squares = self.squares[index].unbind(-1)
        return Rows(chosen, norms, squares, chosen @ chosen.mT)

    def batches(self, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
        """The epoch's batches as indices [T, 2 * batch], positives first: balanced, and a smaller side starts over,
        reshuffled, until the largest was seen once. The order comes from the seed and the epoch's number alone, so that
        a resumed fit sees the same batches."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        steps = -(-max(len(side) for sides in self.sides.values() for side in sides) // batch)

        def shuffled(side: range) -> Tensor:
            rounds = -(-steps * batch // len(side))
            order = torch.cat([torch.randperm(len(side), generator=generator) for _ in range(rounds)])
            return side.start + order[: steps * batch].view(steps, batch)

        pairs = [torch.cat([shuffled(positive), shuffled(negative)], 1) for positive, negative in self.sides.values()]
        return iter(torch.stack(pairs, 1).to(self.centred.device))


def squared_norms(centred: Tensor, origin: Tensor) -> Tensor:
    """Of rows [.., D] that are seen from the origin [D], and of the rows with it: [.., 2]."""
    own = centred.square().sum(-1)
    return torch.stack([own, own + 2 * centred @ origin + origin @ origin], -1)
