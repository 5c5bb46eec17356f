"""What a sweep is after and what it has measured: goals, points, and the places of attributes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from steering.errors import SteeringError
from steering.types import Site
from training.errors import TrainingError
from training.evaluation.evaluator import Evaluator, GateMeans
from training.evaluation.judges import Classifier
from training.evaluation.results import MANY, ON_MANY, ArmResult, Estimate, Evaluation, note_on_many
from training.evaluation.tasks import PRIMARY
from training.files import write_json

FEW = 30  # cases of a metric
NOT = "not "  # before a metric that should be low


@dataclass(frozen=True)
class Goal:
    metrics: tuple[str, ...] = ()
    """Those that count, "not NAME" for one that should be low; none: each attribute's primary one (mc2, accuracy,
    preference), or the judged ones that are named after `attributes`, or else every judged one."""
    max_perplexity_ratio: float = 1.5
    """Where its interval is above 1 as well: of few answers the ratio may be anything."""
    max_repetition: float = 0.1
    """By how much rep-4 may be above the unsteered model's: a text that loops can have any score."""
    max_empty: float = 0.1
    """The same for the share of empty answers. Of few answers one is more than such a share: no single answer, empty or
    looping, is a reason by itself."""
    max_kl: float = 1.0
    """Nats a token on neutral text."""
    keep: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the least that it must be."""
    max_side_effect: float | None = None
    """By how much an attribute by itself may move what counts for the others from what it is unsteered, 0 to 1."""

    tolerance: float = 0.0
    """How much of the score a weaker setting may lack and yet be preferred: less steering, less harm."""
    attributes: tuple[str, ...] = ()
    """Those that are steered."""

    def best(self, ranks: Sequence[tuple[float, float]], strengths: Sequence[float], metrics: int = 1) -> int:
        """The index of the setting to take: the weakest of those that are as good as the best, within the tolerance,
        which is for one metric; the mean of several varies less, by the root of their number."""
        limits, score = max(ranks)
        enough = score - self.tolerance / metrics**0.5
        near = [i for i, rank in enumerate(ranks) if rank[0] == limits and rank[1] >= enough]
        return min(near, key=lambda i: (strengths[i], -ranks[i][1]))

    def score(self, arm: ArmResult, attribute: str | None = None) -> float:
        """The mean, 0 to 1, of the metrics that count; for one `attribute`, of its own. Raises TrainingError."""
        values = [value for name in self._counted(arm, attribute) if (value := _metric(arm, name)) is not None]
        return sum(values) / len(values) if values else 0.0

    def shortfall(self, arm: ArmResult, attribute: str | None = None, baseline: ArmResult | None = None) -> float:
        """By how much the arm misses the limits: each miss of the text as a share of its limit, and what `attribute` by
        itself does to the others, beside the unsteered `baseline`, beyond what it may; 0 within all limits. Raises
        TrainingError for a metric that is not there."""
        excess = [(arm.perplexity_ratio or 0.0) / self.max_perplexity_ratio - 1]
        if arm.perplexity_range is not None and arm.perplexity_range[0] <= 1:
            excess = []
        shares = {"rep-4": self.max_repetition, "empty": self.max_empty}
        limits = {name: max(most, _one_answer(arm, name)) for name, most in shares.items()} | {"kl": self.max_kl}
        excess += [(_more(arm, name) - most) / (most or 1) for name, most in limits.items()]
        missing = [1 - (_metric(arm, name) or 0.0) / least for name, least in self.keep.items() if least > 0]
        beyond = [moved - (self.max_side_effect or 0.0) for moved in self._side_effects(arm, attribute, baseline)]
        return sum(max(0.0, miss) for miss in (*excess, *missing, *beyond))

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

    def counted(self, arm: ArmResult) -> list[str]:
        """The metrics that count for all attributes at once. Raises TrainingError."""
        return self._counted(arm, None)

    def _counted(self, arm: ArmResult, attribute: str | None) -> list[str]:
        if attribute is not None:
            own = [name for name in self.metrics if f"{_bare(name)} ".startswith(f"{attribute} ")]
            usual = (*_named(attribute), *(f"{attribute} {part}" for part in PRIMARY))
            own = own or [name for name in usual if name in arm.metrics]
            if not own:
                raise TrainingError(
                    f"No metric is named after {attribute!r}; there are {', '.join(arm.metrics)}. Name what counts "
                    "(--goal)."
                )
            return own
        for name in self.metrics:
            _metric(arm, name)
        return [*self.metrics] or self.usual(arm) or [*arm.metrics]

    def usual(self, arm: ArmResult) -> list[str]:
        """What counts where none is named, as far as there is such a metric."""
        primary = [name for name in arm.metrics if name.rpartition(" ")[2] in PRIMARY]
        return primary or [name for attribute in self.attributes for name in _named(attribute) if name in arm.metrics]

    def gains(self, arm: ArmResult, differences: Mapping[str, Estimate]) -> dict[str, Estimate]:
        """The differences of the metrics of `arm` that count, more being better. Raises TrainingError."""
        counted = [(name, _metric_of(arm, name)) for name in self.counted(arm)]
        found = {name: (differences[bare], bare != name) for name, bare in counted if bare in differences}
        return {name: _negated(one) if less else one for name, (one, less) in found.items()}


def _more(arm: ArmResult, name: str) -> float:
    """Damage beyond the unsteered arm's; all of it where there is no such arm."""
    found = arm.differences.get(name) or arm.damage.get(name)
    return (found.value if found else None) or 0.0


def _one_answer(arm: ArmResult, name: str) -> float:
    """The most that one answer adds to a mean over all of them."""
    found = arm.damage.get(name)
    return (1 + 1e-9) / found.count if found and found.count else 0.0  # a difference of two rates is rounded


def check_goal(goal: Goal, evaluator: Evaluator) -> None:
    """Raises TrainingError where the score would be the same whatever steering did."""
    judge = evaluator.judge
    if goal.metrics or not isinstance(judge, Classifier) or judge.several or {*goal.attributes} & {*judge.labels}:
        return
    name = judge.labels[0] if evaluator.prompts else f"{goal.attributes[0]} {judge.labels[0]}"
    raise TrainingError(
        f"{judge.name} puts every answer under one of {', '.join(judge.labels)}, so that their mean says nothing: name "
        f"what counts (--goal '{name}', or 'not {name}')."
    )


def _named(attribute: str) -> tuple[str, str]:
    """What a judge's metric of that name is called: of prompts of their own, and of the attribute's data."""
    return attribute, f"{attribute} {attribute}"


def _bare(name: str) -> str:
    return name.removeprefix(NOT)


def _metric_of(arm: ArmResult, name: str) -> str:
    """The arm's metric that `name` is of: itself, or the one that should be low."""
    return name if name in arm.metrics else _bare(name)


def _metric(arm: ArmResult, name: str) -> float | None:
    if (own := _metric_of(arm, name)) not in arm.metrics:
        raise TrainingError(f"There is no metric {own!r}; there are {', '.join(arm.metrics)}.")
    value = arm.metrics[own].value
    return value if own == name or value is None else 1 - value


def _negated(one: Estimate) -> Estimate:
    value, low, high = (None if end is None else -end for end in (one.value, one.high, one.low))
    return replace(one, value=value, low=low, high=high)


@dataclass(frozen=True)
class Place:
    """The sites at which an attribute has a column each, and the factor on their vectors."""

    sites: tuple[Site, ...]
    strength: float


def write_places(path: Path, places: Mapping[str, Place]) -> None:
    """`{"truthfulness": {"sites": ["12.residual"], "strength": 1.5}, ...}`"""
    stored = {
        name: {"sites": [*map(str, place.sites)], "strength": round(place.strength, 4)}
        for name, place in places.items()
    }
    write_json(path, stored)


def read_places(path: Path) -> dict[str, Place]:
    """Raises TrainingError, naming the file, where it is not what `write_places` writes."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: Place(tuple(map(Site.parse, one["sites"])), float(one["strength"])) for name, one in stored.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SteeringError) as error:
        raise TrainingError(
            f"{path} does not hold places as `matsteer sweep --alone` writes them: {error!r}."
        ) from None


@dataclass(frozen=True)
class SweepPoint:
    """One setting of the sweep. `score` is the mean of the metrics that count, `shortfall` by how much it misses the
    limits.

    `attribute` is the one that was steered alone; None: all together."""

    attribute: str | None
    layer: int
    site: str
    multiplier: float
    score: float
    metrics: Mapping[str, float | None]
    perplexity_ratio: float | None
    shortfall: float
    damage: Mapping[str, float | None] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    """To the unsteered model, of metrics and damage."""

    @property
    def rank(self) -> tuple[float, float]:
        """As `Goal.rank` of its result."""
        return -self.shortfall, self.score

    @property
    def place(self) -> Site:
        return Site.parse(f"{self.layer}.{self.site}")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has measured. `points` come best first; `places` and `together`, all attributes at their places at
    once, are those of a sweep of each attribute by itself."""

    points: Sequence[SweepPoint]
    unsteered: ArmResult
    places: Mapping[str, Place] = field(default_factory=dict)
    together: ArmResult | None = None
    attributes: Sequence[str] = ()
    chosen: Evaluation | None = None
    """The best setting of all attributes at once, beside the unsteered model, with examples."""
    gates: Sequence[GateMeans] = ()
    """Its own."""
    notes: tuple[str, ...] = ()
    """Of the evaluations."""

    def remarks(self, goal: Goal) -> Iterator[str]:
        """What a reader should know before believing in the best point."""
        metrics = [*self.unsteered.metrics]
        if metrics[1:] and not goal.metrics and not goal.usual(self.unsteered) and self.points[0].attribute is None:
            listed = ", ".join(metrics)
            yield f"the score is the mean of {listed}; --goal names what counts, 'not NAME' what should be low."
        yield from (note for note in self.notes if not note.endswith(ON_MANY))
        for name in dict.fromkeys(point.attribute for point in self.points):
            before = goal.score(self.unsteered, name)
            if max(point.score for point in self.points if point.attribute == name) <= before:
                yield f"{name or 'all attributes'}: no setting scores above the unsteered model, {100 * before:.1f}."
        if not self.unsteered.damage:
            yield (
                "what steering breaks was not measured (--damage 0): no limit on the text holds, and a setting that "
                "breaks it ranks by its score alone."
            )
        broken = sum(point.shortfall > 0 for point in self.points)
        if broken:
            yield f"{broken} of {len(self.points)} settings are beyond a limit (they damage the text), and rank last."
        if len(self.points) * len(self.unsteered.metrics) > MANY:
            yield note_on_many(len(self.points) * len(self.unsteered.metrics))
        few = [f"{name} {one.count}" for name, one in self.unsteered.metrics.items() if one.count < FEW]
        if few:
            yield f"few cases, so wide intervals: {', '.join(few)}."
