"""What a setting is best at: the mean of the metrics that count, among settings that keep the text in limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.errors import TrainingError
from training.results import ArmResult


@dataclass(frozen=True)
class Goal:
    metrics: tuple[str, ...] = ()
    """Those that count; none: every judged metric, or every mc2."""
    max_perplexity_ratio: float = 1.5
    keep: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the least that it must be."""

    def score(self, arm: ArmResult, attribute: str | None = None) -> float:
        """The mean, 0 to 1, of the metrics that count; for one `attribute`, of its own. Raises TrainingError."""
        values = [value for name in self._counted(arm, attribute) if (value := arm.metrics[name].value) is not None]
        return sum(values) / len(values) if values else 0.0

    def shortfall(self, arm: ArmResult) -> float:
        """By how much the text misses the limits, each miss as a share of its limit; 0 within all of them. Raises
        TrainingError for a metric that is not there."""
        excess = (arm.perplexity_ratio or 0.0) / self.max_perplexity_ratio - 1
        missing = [1 - (_metric(arm, name) or 0.0) / least for name, least in self.keep.items() if least > 0]
        return sum(max(0.0, miss) for miss in (excess, *missing))

    def rank(self, arm: ArmResult, attribute: str | None = None) -> tuple[float, float]:
        """What settings are ordered by, upwards: those within the limits last, by score; the others by how near they
        come to the limits, since a setting that breaks the text can have any score."""
        return -self.shortfall(arm), self.score(arm, attribute)

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
