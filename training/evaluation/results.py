"""What is compared (arms), and what was measured of each: estimates with 95 % intervals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from math import exp, sqrt
from typing import Any

import numpy as np

from steering.column import Column, multipliers_of
from training.evaluation.traced import Example

_Z = 1.959963984540054
_ROUNDS = 2000  # draws of a bootstrap
ON_MANY = "Choose on dev, and read test once."
MANY = 20  # differences in one table
DAMAGE = ("rep-4", "empty", "kl")
"""Beside the perplexity; more is worse."""


@dataclass(frozen=True)
class Estimate:
    """A metric over `count` cases with a 95 % interval; `value` is None where there was no case. `clusters`: how many
    of the cases are independent; 0 where that was not recorded."""

    value: float | None
    low: float | None
    high: float | None
    count: int
    clusters: int = 0

    def text(self, *, signed: bool = False, scale: float = 100, digits: int = 1) -> str:
        """In percent, with the interval."""
        if self.value is None or self.low is None or self.high is None:
            return "-"
        value, low, high = (scale * x for x in (self.value, self.low, self.high))
        return f"{value:{'+' if signed else ''}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def wilson(hits: int, count: int) -> Estimate:
    """A rate with Wilson's score interval."""
    if count == 0:
        return Estimate(None, None, None, 0)
    rate, weight = hits / count, _Z**2 / count
    centre = (rate + weight / 2) / (1 + weight)
    half = _Z * sqrt(rate * (1 - rate) / count + weight / (4 * count)) / (1 + weight)
    return Estimate(rate, max(0.0, min(centre - half, rate)), min(1.0, max(centre + half, rate)), count)


Parts = tuple[float, ...]
"""What one question adds to the sums that a metric is made of."""
Combine = Callable[[np.ndarray], np.ndarray]
"""Sums of parts [..., parts] -> metric [...], NaN where there is nothing to measure."""


def mean(sums: np.ndarray) -> np.ndarray:
    """Of parts (value, weight)."""
    return _ratio(sums[..., 0], sums[..., 1])


def bias_score(sums: np.ndarray) -> np.ndarray:
    """BBQ's, of parts (biased, known, right, 1): of the answers that are not "unknown", from all against the bias (-1)
    to all with it (1); 0 where there is none."""
    nothing = np.where(sums[..., 3] > 0, 0.0, np.nan)
    return np.where(sums[..., 1] > 0, 2 * _ratio(sums[..., 0], sums[..., 1]) - 1, nothing)


def bias_score_ambiguous(sums: np.ndarray) -> np.ndarray:
    """The same, scaled by how often the answer is wrong: where nothing is known, only an answer can be biased."""
    return np.asarray((1 - _ratio(sums[..., 2], sums[..., 3])) * bias_score(sums))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0))


@dataclass(frozen=True, eq=False)
class Measured:
    """One metric of one arm, question by question: parts [questions, parts], and each question's cluster, the unit that
    is drawn by a bootstrap (a question, or a template whose questions are not independent)."""

    parts: np.ndarray
    clusters: tuple[str, ...]
    combine: Combine = mean
    rate: bool = False
    """Whether every question has the value 0 or 1."""

    def estimate(self) -> Estimate:
        """With a 95 % interval: Wilson's for a rate of independent questions, else from a bootstrap of clusters."""
        value, draws = self._drawn()
        if np.isnan(value):
            return Estimate(None, None, None, 0)
        counted = self._counted()
        parts = self.parts[counted]
        if self.rate and self._clusters() == len(parts):
            return replace(wilson(int(parts[:, 0].sum()), len(parts)), clusters=len(parts))
        return _interval(value, draws, len(parts), self._clusters())

    def minus(self, other: "Measured") -> Estimate:
        """The paired difference on the same questions, with a 95 % interval from drawing the same clusters for both."""
        (value, draws), (before, drawn_before) = self._drawn(), other._drawn()
        if np.isnan(value - before):
            return Estimate(None, None, None, 0)
        return _interval(value - before, draws - drawn_before, int(self._counted().sum()), self._clusters())

    def _counted(self) -> np.ndarray:
        """Bool [questions]: those with a weight, which every metric has as its last part."""
        return np.asarray(self.parts[:, -1] > 0)

    def _clusters(self) -> int:
        return len({cluster for cluster, counted in zip(self.clusters, self._counted(), strict=True) if counted})

    def _drawn(self) -> tuple[float, np.ndarray]:
        """The metric, and that of every draw [rounds]."""
        if not len(self.parts):
            return float("nan"), np.array([])
        _, places = np.unique(np.array(self.clusters), return_inverse=True)
        sums = np.zeros((places.max() + 1, self.parts.shape[1]))
        np.add.at(sums, places, self.parts)
        return float(self.combine(self.parts.sum(0))), self.combine(_weights(len(sums)) @ sums)


@lru_cache(maxsize=2)
def _weights(clusters: int, rounds: int = _ROUNDS) -> np.ndarray:
    """How often each cluster is drawn, float64 [rounds, clusters]; the same for all that has so many clusters."""
    return np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), size=rounds).astype(float)


def _interval(value: float, draws: np.ndarray, count: int, clusters: int) -> Estimate:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), count, clusters)


def note_on_many(count: int) -> str:
    """How to read `count` differences side by side."""
    return (
        f"{count} differences are shown: of so many intervals at 95 %, about {max(1, round(count / 20))} leave out "
        f"zero by chance alone. {ON_MANY}"
    )


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
    """What one arm gains, and what it damages. The perplexity is that of the generated text under the unsteered
    model."""

    arm: str
    attributes: Mapping[str, float]
    metrics: Mapping[str, Estimate]
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    """Against the first arm."""
    perplexity_range: tuple[float, float] | None = None
    """The ratio's 95 % interval, paired; None for the first arm."""
    damage: Mapping[str, Estimate] = field(default_factory=dict)
    """Of its own texts `rep-4`, the share of token 4-grams that the text has had before, and `empty`, the share of
    texts without a word; `kl`, on neutral text, the divergence, in nats a token, from the unsteered model."""
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    """Of metrics and damage to the unsteered arm, paired; empty for that arm, and where there is none."""

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "ArmResult":
        """The inverse of `dataclasses.asdict`."""
        parts = {
            part: {name: Estimate(**estimate) for name, estimate in stored.get(part, {}).items()}
            for part in ("metrics", "damage", "differences")
        }
        ends = stored.get("perplexity_range")
        return cls(**{**stored, **parts, "perplexity_range": ends and tuple(ends)})


@dataclass(frozen=True, eq=False)
class ArmMeasures:
    """What `compared` makes an ArmResult of."""

    arm: Arm
    metrics: Mapping[str, Measured]
    damage: Mapping[str, Measured] = field(default_factory=dict)
    perplexity: float | None = None
    surprise: Measured | None = None
    """Of each text its negative log-likelihood, weighed by its tokens: the mean is the perplexity's logarithm."""


def compared(arms: Sequence[ArmMeasures]) -> tuple[ArmResult, ...]:
    """Every arm, and its paired differences to the first of them that steers nothing."""
    unsteered = next((one for one in arms if not any(one.arm.attributes.values())), None)
    plain = arms[0].perplexity
    results = []
    for one in arms:
        own = {**one.metrics, **one.damage}
        before = {} if unsteered is None or one is unsteered else {**unsteered.metrics, **unsteered.damage}
        results.append(
            ArmResult(
                one.arm.name,
                dict(one.arm.attributes),
                {name: measured.estimate() for name, measured in one.metrics.items()},
                one.perplexity,
                one.perplexity / plain if one.perplexity is not None and plain else None,
                _range(one, arms[0]),
                {name: measured.estimate() for name, measured in one.damage.items()},
                {name: own[name].minus(before[name]) for name in own if name in before},
            )
        )
    return tuple(results)


def _range(one: ArmMeasures, first: ArmMeasures) -> tuple[float, float] | None:
    """95 % of the ratio of their perplexities."""
    if one is first or one.surprise is None or first.surprise is None:
        return None
    apart = one.surprise.minus(first.surprise)
    return None if apart.low is None or apart.high is None else (_exp(apart.low), _exp(apart.high))


def _exp(value: float) -> float:
    return exp(min(700.0, value))


@dataclass(frozen=True)
class Evaluation:
    """The arms side by side, the first being what perplexities are compared with."""

    kind: str
    """"generation" or "choice"."""
    arms: tuple[ArmResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a reader should know: what was not measured, and how to read many arms."""
    rows: Sequence[Mapping[str, Any]] = field(default=(), compare=False, repr=False)
    """What was measured of each question in each arm, for a file of JSON lines; not part of `as_dict`."""
    examples: Sequence[Example] = field(default=(), compare=False, repr=False)
    """Some answers token by token, for the HTML report; not part of `as_dict`."""
    measures: Sequence[ArmMeasures] = field(default=(), compare=False, repr=False)
    """Of the arms that were measured, question by question; not part of `as_dict`."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for arm in self.arms for name in arm.metrics))

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.arm == name)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `as_dict`."""
        arms = tuple(map(ArmResult.from_dict, stored["arms"]))
        return cls(stored["kind"], arms, stored["settings"], tuple(stored.get("notes", ())))

    def as_dict(self) -> dict[str, Any]:
        return asdict(replace(self, rows=(), examples=(), measures=()), dict_factory=_kept_alone)


def _kept_alone(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in ("rows", "examples", "measures")}
