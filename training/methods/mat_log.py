"""What one epoch of MAT-Steer did: enough to see whether it trains."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from training.methods.losses import cosines
from training.methods.mat_config import MatConfig
from training.methods.mat_model import Model

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


def mean_losses(terms: list[Tensor], config: MatConfig) -> dict[str, float]:
    """The terms [4] of an epoch's steps, averaged, and their weighted sum."""
    mmd, positive, sparse, orthogonal = torch.stack(terms).mean(0).tolist()
    loss = mmd + config.l_pos * positive + config.l_sparse * sparse + config.l_ortho * orthogonal
    return {"loss": loss, "mmd": mmd, "positive": positive, "sparse": sparse, "orthogonal": orthogonal}


def norms_of(model: Model, names: tuple[str, ...]) -> dict[str, float]:
    return dict(zip(names, (model.vectors.norm(dim=1) * model.frame.scale).tolist(), strict=True))


def cosines_of(model: Model, names: tuple[str, ...]) -> dict[str, float]:
    angles = cosines(model.vectors).tolist()
    return {f"{a}/{b}": angles[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
