"""Layers x sites x multipliers, measured on dev: which setting steers best."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from steering.types import Column, Site
from training.activations.artifact import Activations
from training.data.samples import Sample, Split
from training.errors import TrainingError
from training.evaluation.arms import BASELINE, Arm, default_arm
from training.evaluation.judges import judge_key
from training.evaluation.measure import Measure
from training.evaluation.results import ArmResult
from training.files import content_key, write_bytes, write_json
from training.methods.fit import Recipe, fit
from training.models import Base
from training.sweeps.goal import Goal
from training.sweeps.places import Place, write_places
from training.sweeps.report import markdown, plot
from training.sweeps.strengths import combine

Say = Callable[[str], None]
FEW = 30  # cases of a metric
CANDIDATES = 3  # further sites that are tried for an attribute, the best by themselves first


@dataclass(frozen=True)
class Point:
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
class Swept:
    """What a sweep has measured. `points` come best first; `places` and `together`, all attributes at their places at
    once, are those of a sweep of each attribute by itself."""

    points: Sequence[Point]
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
    measure: Measure
    out: Path
    goal: Goal
    split: Split = Split.DEV
    progress: bool = False
    say: Say = lambda _: None

    def together(self) -> Swept:
        """All attributes at once at every site and multiplier, the best point first.

        Sites that an earlier, interrupted call has measured are read from `out`; `sweep.json`, `sweep.md` and
        `best.json` are written there, and a plot where matplotlib is installed. Raises TrainingError.
        """
        swept = self._sweep([None])
        self._write(swept)
        write_json(self.out / "best.json", asdict(swept.points[0]))
        return swept

    def alone(self, sites_each: int = 1, *, apart: bool = False) -> Swept:
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

    def _best_sites(self, name: str, points: Sequence[Point], most: int) -> Place:
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

    def _sweep(self, attributes: Sequence[str | None]) -> Swept:
        if not self.multipliers:
            raise TrainingError("A sweep needs at least one multiplier.")
        found = [
            self._measured(number, site, attributes) for number, site in enumerate(self.activations.sites, start=1)
        ]
        points = [point for swept in found for point in swept.points]
        return Swept(sorted(points, key=lambda point: point.rank, reverse=True), found[0].unsteered)

    def _measured(self, number: int, site: Site, attributes: Sequence[str | None]) -> Swept:
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
        return Swept(points, unsteered)

    def _fit(self, site: Site, attribute: str | None) -> Sequence[Column]:
        """All attributes together, or one as if there were no other: at one site they shape each other."""
        if attribute is None:
            return fit(self.activations, [site], self.recipe, progress=self.progress)
        recipe = self._recipe_at({attribute: Place((site,), 1.0)})
        return fit(self.activations, [], recipe, progress=self.progress)

    def _run(self, columns: Sequence[Column], arms: Sequence[Arm]) -> Sequence[ArmResult]:
        """The unsteered arm's result, then those of `arms`."""
        evaluation, _ = self.measure.run(
            self.base, columns, [BASELINE, *arms], self.samples, self.split, progress=self.progress
        )
        return evaluation.arms

    def _point(self, site: Site, attribute: str | None, factor: float, arm: ArmResult, unsteered: ArmResult) -> Point:
        return Point(
            attribute=attribute,
            layer=site.layer,
            site=site.kind.value,
            multiplier=factor,
            score=self.goal.score(arm, attribute),
            metrics={name: estimate.value for name, estimate in arm.metrics.items()},
            perplexity_ratio=arm.perplexity_ratio,
            shortfall=self.goal.shortfall(arm, attribute, unsteered),
        )

    def _write(self, swept: Swept) -> None:
        write_json(self.out / "sweep.json", [asdict(point) for point in swept.points])
        beside = {"unsteered": swept.unsteered, "together": swept.together}
        write_json(self.out / "beside.json", {name: asdict(arm) for name, arm in beside.items() if arm})
        write_bytes(self.out / "sweep.md", markdown(swept).encode())
        plot(swept.points, self.out / "sweep.png")

    def _key(self, attributes: Sequence[str | None]) -> str:
        content = {
            "first arm": BASELINE.name,
            "activations": dict(self.activations.source),
            "recipe": self.recipe.as_dict(),
            "multipliers": list(self.multipliers),
            "attributes": list(attributes),
            "judge": self.measure.judge and judge_key(self.measure.judge),
            "prompts": [(prompt.text, prompt.split) for prompt in self.measure.prompts],
            "sampling": asdict(self.measure.sampling),
            "limit": self.measure.limit,
            "positions": self.measure.positions.value,
            "split": self.split.value,
        }
        return content_key(content)


def _listed(sites: Sequence[Site]) -> str:
    return " and ".join(map(str, sites))


def _arm(columns: Sequence[Column], attribute: str | None, factor: float) -> Arm:
    name = f"{attribute or 'all'} {factor:g}"
    return default_arm(columns, factor, name) if attribute is None else Arm(name, {attribute: factor})
