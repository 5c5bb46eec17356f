"""Estimates with 95 % intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch

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
