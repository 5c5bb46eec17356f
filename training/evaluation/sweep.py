"""Layers x sites x multipliers, measured on dev: which setting steers best, by which goal, and how strongly."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from steering.errors import SteeringError
from steering.types import Column, Site
from training.activations.store import Activations
from training.data.samples import Sample, Split
from training.errors import TrainingError
from training.evaluation.evaluator import Evaluator
from training.evaluation.generation import judge_key
from training.evaluation.report import plot_sweep, sweep_markdown
from training.evaluation.results import BASELINE, Arm, ArmResult, default_arm
from training.files import content_key, write_bytes, write_json
from training.methods.fit import Recipe, fit
from training.models import Base

SCALES = (0.6, 0.8, 1.0, 1.2)
FEW = 30  # cases of a metric
CANDIDATES = 3  # further sites that are tried for an attribute, the best by themselves first


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


Run = Callable[[Sequence[Arm]], Sequence[ArmResult]]
"""Measures arms, and gives their results in order."""


def arms_alone(names: Sequence[str], factors: Sequence[float]) -> list[Arm]:
    """Every attribute by itself at every factor."""
    return [Arm(f"{name} {factor:g}", {name: factor}) for name in names for factor in factors]


def best_alone(run: Run, names: Sequence[str], factors: Sequence[float], goal: Goal) -> dict[str, float]:
    """The factor at which each attribute by itself does best."""
    arms = arms_alone(names, factors)
    results = dict(zip([(name, factor) for name in names for factor in factors], run(arms), strict=True))
    return {name: max(factors, key=lambda factor: goal.rank(results[name, factor], name)) for name in names}


def combine(
    run: Run, alone: Mapping[str, float], goal: Goal, scales: Sequence[float] = SCALES, rounds: int = 2
) -> dict[str, float]:
    """Strengths for all attributes at once, from those that are best alone: first the best scale for all of them,
    then each in turn takes the scale that is best beside the others as they stand (coordinate ascent)."""

    def best(tried: Sequence[dict[str, float]]) -> dict[str, float]:
        results = run([Arm(f"setting {number}", setting) for number, setting in enumerate(tried)])
        sums = [sum(value / alone[name] for name, value in setting.items() if alone[name]) for setting in tried]
        return tried[goal.best([goal.rank(result) for result in results], sums, len(alone))]

    found = best([{name: scale * value for name, value in alone.items()} for scale in sorted(scales, reverse=True)])
    for _ in range(rounds):
        before = found
        for name in alone:
            found = best([found, *({**found, name: scale * alone[name]} for scale in scales)])
        if found == before:
            break
    return found


Say = Callable[[str], None]


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

    def remarks(self, goal: Goal) -> Iterator[str]:
        """What a reader should know before believing in the best point."""
        for name in dict.fromkeys(point.attribute for point in self.points):
            before = goal.score(self.unsteered, name)
            if max(point.score for point in self.points if point.attribute == name) <= before:
                yield f"{name or 'all attributes'}: no setting scores above the unsteered model, {100 * before:.1f}."
        few = [f"{name} {one.count}" for name, one in self.unsteered.metrics.items() if one.count < FEW]
        if few:
            yield f"few cases, so wide intervals: {', '.join(few)}."


@dataclass(frozen=True)
class Sweep:
    """What is swept: every site of `activations`, every one of `multipliers`, measured on `split`."""

    base: Base
    samples: Sequence[Sample]
    activations: Activations
    recipe: Recipe
    multipliers: Sequence[float]
    evaluator: Evaluator
    out: Path
    goal: Goal
    split: Split = Split.DEV
    progress: bool = False
    say: Say = lambda _: None

    def together(self) -> SweepResult:
        """All attributes at once at every site and multiplier, the best point first.

        Sites that an earlier, interrupted call has measured are read from `out`; `sweep.json`, `sweep.md` and
        `best.json` are written there, and a plot_sweep where matplotlib is installed. Raises TrainingError.
        """
        swept = self._sweep([None])
        self._write(swept)
        write_json(self.out / "best.json", asdict(swept.points[0]))
        return swept

    def alone(self, sites_each: int = 1, *, apart: bool = False) -> SweepResult:
        """Each attribute by itself at every site and multiplier, then all at once, every one at its best site, at
        strengths that go together. With more `sites_each`, an attribute takes further sites as long as they help;
        `apart`: none that an attribute before it has. As `together`, with `places.json` for `matsteer train --places`
        beside it."""
        swept = self._sweep(self.activations.names)
        self._write(swept)
        best: dict[str, Place] = {}
        for name in self.activations.names:
            taken = {site for place in best.values() for site in place.sites} if apart else set()
            own = [point for point in swept.points if point.attribute == name and point.place not in taken]
            if not own:
                raise TrainingError(f"No site is left for {name}: sweep more of them, or fewer for each attribute.")
            best[name] = self._best_sites(name, own, sites_each)
        self.say(f"together: {', '.join(f'{name} at {_listed(place.sites)}' for name, place in best.items())}")
        columns = fit(self.activations, [], self._recipe_at(best), progress=self.progress)
        strengths = combine(
            lambda arms: self._run(columns, arms)[1:], {name: place.strength for name, place in best.items()}, self.goal
        )
        places = {name: Place(place.sites, strengths[name]) for name, place in best.items()}
        write_places(self.out / "places.json", places)
        swept = replace(swept, places=places, together=self._run(columns, [Arm("together", strengths)])[1])
        self._write(swept)
        return swept

    def _best_sites(self, name: str, points: Sequence[SweepPoint], most: int) -> Place:
        """The best of an attribute's `points`, which come best first, and further sites of theirs that help."""
        ranked = list(dict.fromkeys(point.place for point in points))
        there = [point for point in points if point.place == ranked[0]]
        first = there[self.goal.best([point.rank for point in there], [point.multiplier for point in there])]
        chosen, strength, rank = ranked[:1], first.multiplier, first.rank
        while len(chosen) < most:
            tried = []
            for site in [site for site in ranked if site not in chosen][:CANDIDATES]:
                place = Place((*chosen, site), strength)
                self.say(f"{name} at {_listed(place.sites)}")
                columns = fit(self.activations, [], self._recipe_at({name: place}), progress=self.progress)
                arms = [Arm(f"{name} {x:g}", {name: x}) for x in self.multipliers]
                unsteered, *results = self._run(columns, arms)
                ranks = [self.goal.rank(result, name, unsteered) for result in results]
                best = self.goal.best(ranks, self.multipliers)
                tried.append((ranks[best], site, self.multipliers[best]))
            # Further sites have to be worth more than a weaker setting may lack.
            enough = rank[0], rank[1] + self.goal.tolerance
            if not tried or max(tried, key=lambda one: one[0])[0] <= enough:
                break
            rank, site, strength = max(tried, key=lambda one: one[0])
            chosen.append(site)
        return Place(tuple(chosen), strength)

    def _recipe_at(self, places: Mapping[str, Place]) -> Recipe:
        return self.recipe.at({name: place.sites for name, place in places.items()})

    def _sweep(self, attributes: Sequence[str | None]) -> SweepResult:
        if not self.multipliers:
            raise TrainingError("A sweep needs at least one multiplier.")
        found = [
            self._measured(number, site, attributes) for number, site in enumerate(self.activations.sites, start=1)
        ]
        points = [point for swept in found for point in swept.points]
        return SweepResult(sorted(points, key=lambda point: point.rank, reverse=True), found[0].unsteered)

    def _measured(self, number: int, site: Site, attributes: Sequence[str | None]) -> SweepResult:
        """The points of one site, measured now or by an earlier call."""
        self.say(f"site {number}/{len(self.activations.sites)}: {site}")
        settings = [(attribute, factor) for attribute in attributes for factor in self.multipliers]
        path, key = self.out / "sites" / f"{site}.json", self._key(attributes)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored.get("key") != key:
            columns = [column for attribute in attributes for column in self._fit(site, attribute)]
            results = self._run(columns, [_arm(columns, attribute, factor) for attribute, factor in settings])
            stored = {"key": key, "arms": [asdict(result) for result in results]}
            write_json(path, stored)
        unsteered, *arms = map(ArmResult.from_dict, stored["arms"])
        points = [
            self._point(site, attribute, factor, arm, unsteered)
            for (attribute, factor), arm in zip(settings, arms, strict=True)
        ]
        return SweepResult(points, unsteered)

    def _fit(self, site: Site, attribute: str | None) -> Sequence[Column]:
        """All attributes together, or one as if there were no other: at one site they shape each other."""
        if attribute is None:
            return fit(self.activations, [site], self.recipe, progress=self.progress)
        recipe = self._recipe_at({attribute: Place((site,), 1.0)})
        return fit(self.activations, [], recipe, progress=self.progress)

    def _run(self, columns: Sequence[Column], arms: Sequence[Arm]) -> Sequence[ArmResult]:
        """The unsteered arm's result, then those of `arms`."""
        evaluation, _ = self.evaluator.evaluate(
            self.base, columns, [BASELINE, *arms], self.samples, self.split, progress=self.progress
        )
        return evaluation.arms

    def _point(
        self, site: Site, attribute: str | None, factor: float, arm: ArmResult, unsteered: ArmResult
    ) -> SweepPoint:
        return SweepPoint(
            attribute=attribute,
            layer=site.layer,
            site=site.kind.value,
            multiplier=factor,
            score=self.goal.score(arm, attribute),
            metrics={name: estimate.value for name, estimate in arm.metrics.items()},
            perplexity_ratio=arm.perplexity_ratio,
            shortfall=self.goal.shortfall(arm, attribute, unsteered),
        )

    def _write(self, swept: SweepResult) -> None:
        write_json(self.out / "sweep.json", [asdict(point) for point in swept.points])
        beside = {"unsteered": swept.unsteered, "together": swept.together}
        write_json(self.out / "beside.json", {name: asdict(arm) for name, arm in beside.items() if arm})
        write_bytes(self.out / "sweep.md", sweep_markdown(swept).encode())
        plot_sweep(swept.points, self.out / "sweep.png")

    def _key(self, attributes: Sequence[str | None]) -> str:
        content = {
            "first arm": BASELINE.name,
            "activations": dict(self.activations.source),
            "recipe": self.recipe.as_dict(),
            "multipliers": list(self.multipliers),
            "attributes": list(attributes),
            "judge": self.evaluator.judge and judge_key(self.evaluator.judge),
            "prompts": [(prompt.text, prompt.split) for prompt in self.evaluator.prompts],
            "sampling": asdict(self.evaluator.sampling),
            "limit": self.evaluator.limit,
            "positions": self.evaluator.positions.value,
            "split": self.split.value,
        }
        return content_key(content)


def _listed(sites: Sequence[Site]) -> str:
    return " and ".join(map(str, sites))


def _arm(columns: Sequence[Column], attribute: str | None, factor: float) -> Arm:
    name = f"{attribute or 'all'} {factor:g}"
    return default_arm(columns, factor, name) if attribute is None else Arm(name, {attribute: factor})
