"""What a setting is best at: the mean of the metrics that count, among settings that keep the text in limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from training.errors import TrainingError
from training.evaluation.results import ArmResult


@dataclass(frozen=True)
class Goal:
    metrics: tuple[str, ...] = ()
    """Those that count; none: every judged metric, or every mc2."""
    max_perplexity_ratio: float = 1.5
    keep: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the least that it must be."""
    max_side_effect: float | None = None
    """By how much an attribute by itself may move what counts for the others from what it is unsteered, 0 to 1."""

    tolerance: float = 0.0
    """How much of the score a weaker setting may lack and yet be preferred: less steering, less harm."""

    def best(self, ranks: Sequence[tuple[float, float]], strengths: Sequence[float], metrics: int = 1) -> int:
        """The index of the setting to take: the weakest of those that are as good as the best, within the tolerance,
        which is for one metric; the mean of several varies less, by the root of their number."""
        limits, score = max(ranks)
        enough = score - self.tolerance / metrics**0.5
        near = [i for i, rank in enumerate(ranks) if rank[0] == limits and rank[1] >= enough]
        return min(near, key=lambda i: (strengths[i], -ranks[i][1]))

    def score(self, arm: ArmResult, attribute: str | None = None) -> float:
        """The mean, 0 to 1, of the metrics that count; for one `attribute`, of its own. Raises TrainingError."""
        values = [value for name in self._counted(arm, attribute) if (value := arm.metrics[name].value) is not None]
        return sum(values) / len(values) if values else 0.0

    def shortfall(self, arm: ArmResult, attribute: str | None = None, baseline: ArmResult | None = None) -> float:
        """By how much the arm misses the limits: each miss of the text as a share of its limit, and what `attribute` by
        itself does to the others, beside the unsteered `baseline`, beyond what it may; 0 within all limits. Raises
        TrainingError for a metric that is not there."""
        excess = (arm.perplexity_ratio or 0.0) / self.max_perplexity_ratio - 1
        missing = [1 - (_metric(arm, name) or 0.0) / least for name, least in self.keep.items() if least > 0]
        beyond = [moved - (self.max_side_effect or 0.0) for moved in self._side_effects(arm, attribute, baseline)]
        return sum(max(0.0, miss) for miss in (excess, *missing, *beyond))

    def rank(
        self, arm: ArmResult, attribute: str | None = None, baseline: ArmResult | None = None
    ) -> tuple[float, float]:
        """What settings are ordered by, upwards: those within the limits last, by score; the others by how near they
        come to the limits, since a setting that breaks the text can have any score."""
        return -self.shortfall(arm, attribute, baseline), self.score(arm, attribute)

    def _side_effects(self, arm: ArmResult, attribute: str | None, baseline: ArmResult | None) -> list[float]:
        if self.max_side_effect is None or attribute is None or baseline is None:
            return []
        own = self._counted(arm, attribute)
        others = [name for name in self._counted(arm, None) if name not in own and name not in self.keep]
        pairs = [(_metric(arm, name), _metric(baseline, name)) for name in others]
        return [abs(now - before) for now, before in pairs if now is not None and before is not None]

    def _counted(self, arm: ArmResult, attribute: str | None) -> list[str]:
        if attribute is not None:
            own = [name for name in (attribute, f"{attribute} mc2") if name in arm.metrics]
            if not own:
                raise TrainingError(f"No metric is named after {attribute!r}; there are {', '.join(arm.metrics)}.")
            return own
        for name in self.metrics:
            _metric(arm, name)
        return [*self.metrics] or [name for name in arm.metrics if name.endswith(" mc2")] or [*arm.metrics]


def _metric(arm: ArmResult, name: str) -> float | None:
    if name not in arm.metrics:
        raise TrainingError(f"There is no metric {name!r}; there are {', '.join(arm.metrics)}.")
    return arm.metrics[name].value
