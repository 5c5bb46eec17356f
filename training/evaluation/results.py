"""What is compared (arms), and what was measured of each: estimates with 95 % intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import torch

from steering.types import Column, multipliers_of

_Z = 1.959963984540054
_DRAWS = 2**21  # of a bootstrap, held in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` cases with a 95 % interval; `value` is None where there was no case."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    def text(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "-"
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(hits: int, count: int) -> Estimate:
    """A rate with Wilson's score interval."""
    if count == 0:
        return Estimate(None, None, None, 0)
    rate, weight = hits / count, _Z**2 / count
    centre = (rate + weight / 2) / (1 + weight)
    half = _Z * sqrt(rate * (1 - rate) / count + weight / (4 * count)) / (1 + weight)
    return Estimate(rate, max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate)), count)


def bootstrap(values: Sequence[float], *, seed: int = 0, rounds: int = 2000) -> Estimate:
    """A mean with a percentile bootstrap interval."""
    if not values:
        return Estimate(None, None, None, 0)
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rounds_at_once = max(1, _DRAWS // len(data))
    means = torch.cat(
        [
            data[torch.randint(len(data), (min(rounds_at_once, rounds - done), len(data)), generator=generator)].mean(1)
            for done in range(0, rounds, rounds_at_once)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(data.mean()), low, high, len(data))


@dataclass(frozen=True)
class Arm:
    """A named setting: attribute -> multiplier, 0 for attributes that are not named."""

    name: str
    attributes: Mapping[str, float] = field(default_factory=dict)

    def multipliers(self, columns: Sequence[Column]) -> tuple[float, ...]:
        """One multiplier a column; columns of one attribute share it. Raises ColumnError for an unknown name."""
        return multipliers_of(columns, self.attributes)


BASELINE = Arm("unsteered")


def default_arm(columns: Sequence[Column], scale: float = 1.0, name: str = "steered") -> Arm:
    """Every attribute at `scale` times its default multiplier."""
    return Arm(name, {column.attribute: scale * column.default_multiplier for column in columns})


def single_arms(columns: Sequence[Column], scale: float = 1.0) -> tuple[Arm, ...]:
    """One arm an attribute: that attribute alone, where its default is 0 at 1."""
    full = default_arm(columns, scale).attributes
    return tuple(Arm(f"{name} alone", {name: value or scale}) for name, value in full.items())


@dataclass(frozen=True)
class ArmResult:
    """One arm's metrics. The perplexity is that of the generated text under the unsteered model."""

    arm: str
    attributes: Mapping[str, float]
    metrics: Mapping[str, Estimate]
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    """Against the first arm."""

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "ArmResult":
        """The inverse of `dataclasses.asdict`."""
        metrics = {name: Estimate(**estimate) for name, estimate in stored["metrics"].items()}
        return cls(**{**stored, "metrics": metrics})


@dataclass(frozen=True)
class Evaluation:
    """The arms side by side, the first being what the others are compared with."""

    kind: str
    """"generation" or "choice"."""
    arms: tuple[ArmResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for arm in self.arms for name in arm.metrics))

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.arm == name)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `as_dict`."""
        return cls(stored["kind"], tuple(map(ArmResult.from_dict, stored["arms"])), stored["settings"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
