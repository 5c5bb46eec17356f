"""What one epoch of MAT-Steer did: enough to see whether it trains."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from training.activations import Contrast
from training.losses import Terms, cosines, mmd2
from training.methods.mat_model import Frame, Model, thin

DEAD_GATE = 0.05


@dataclass(frozen=True)
class Side:
    """One attribute on one split."""

    mmd: float
    """MMD^2 between positives and negatives steered as in the training, as a share of the unsteered one."""
    gate_positive: float
    gate_negative: float


@dataclass(frozen=True)
class Epoch:
    epoch: int
    losses: dict[str, float]
    """"loss", the weighted sum, and the terms unweighted: "mmd", "positive", "sparse", "orthogonal"; averaged over the
    epoch's steps."""
    norms: dict[str, float]
    """|theta| of each attribute, in the units of the activations."""
    cosines: dict[str, float]
    """Of each pair of vectors, under "first/second"."""
    train: dict[str, Side]
    dev: dict[str, Side] | None

    @property
    def dev_mmd(self) -> float | None:
        return sum(side.mmd for side in self.dev.values()) / len(self.dev) if self.dev else None

    @property
    def dead(self) -> list[str]:
        """Attributes whose gate has closed on the very activations that it should steer."""
        return [name for name, side in self.train.items() if side.gate_negative < DEAD_GATE]

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> Self:
        row: dict[str, Any] = json.loads(line)
        for split in ("train", "dev"):
            if row[split] is not None:
                row[split] = {name: Side(**side) for name, side in row[split].items()}
        return cls(**row)


def loss_row(loss: Tensor, terms: Terms) -> Tensor:
    """The numbers [5] that are kept of one step, without its graph."""
    return torch.stack([loss, terms.mmd, terms.positive, terms.sparse, terms.orthogonal]).detach()


def mean_losses(rows: list[Tensor]) -> dict[str, float]:
    """The losses of an epoch's steps, averaged."""
    values = torch.stack(rows).mean(0).tolist()
    return dict(zip(("loss", "mmd", "positive", "sparse", "orthogonal"), values, strict=True))


@torch.no_grad()
def inspect(
    model: Model, contrasts: Mapping[str, Contrast], sigmas: Tensor, unsteered: Tensor, joint: bool
) -> dict[str, Side]:
    """Measure each attribute on (at most 512 + 512 of) its activations, given in the model's frame."""
    sides = {}
    for index, (name, contrast) in enumerate(contrasts.items()):
        positive, negative = thin(contrast.positive), thin(contrast.negative)
        gates = model.gates(negative)
        acting = gates if joint else gates * torch.eye(len(contrasts), device=gates.device)[index]
        mmd = mmd2(positive, model.steer(negative, acting), sigmas[index]) / unsteered[index]
        sides[name] = Side(float(mmd), float(model.gates(positive)[:, index].mean()), float(gates[:, index].mean()))
    return sides


def norms_of(model: Model, names: tuple[str, ...], frame: Frame) -> dict[str, float]:
    return dict(zip(names, (model.vectors.detach().norm(dim=1) * frame.scale).tolist(), strict=True))


def cosines_of(model: Model, names: tuple[str, ...]) -> dict[str, float]:
    angles = cosines(model.vectors.detach()).tolist()
    return {f"{a}/{b}": angles[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
