"""Layers x sites x multipliers, measured on dev: which setting steers best, by which goal, and how strongly."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steering.types import Column, Site
from training.activations.store import Activations
from training.data.samples import Sample, Split
from training.errors import TrainingError
from training.evaluation.evaluator import EXAMPLES, Evaluator, gate_means
from training.evaluation.judges import judge_key
from training.evaluation.report import plot_sweep, store_rows, sweep_markdown
from training.evaluation.results import BASELINE, Arm, ArmResult, default_arm
from training.evaluation.sweep_results import Goal, Place, SweepPoint, SweepResult, write_places
from training.files import content_key, write_bytes, write_json
from training.methods.fit import Recipe, fit
from training.models import Base
from training.progress import Advance, progress_bar

SCALES = (0.6, 0.8, 1.0, 1.2)
CANDIDATES = 3  # further sites that are tried for an attribute, the best by themselves first


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

    @property
    def _texts(self) -> dict[str, Any]:
        """For a method that is trained through the model."""
        return {"base": self.base, "samples": self.samples}

    def measured(self) -> SweepResult:
        """All attributes at once at every site and multiplier, the best point first.

        Sites that an earlier, interrupted call has measured are read from `out`; `sweep.json`, `sweep.md` and
        `best.json` are written there, and a plot_sweep where matplotlib is installed. Raises TrainingError.
        """
        swept = self._sweep([None])
        self._write(swept)
        write_json(self.out / "best.json", asdict(swept.points[0]))
        return swept

    def together(self) -> SweepResult:
        """As `measured`, and the best setting beside the unsteered model, with examples."""
        swept = self.measured()
        best = swept.points[0]
        columns = fit(self.activations, [best.place], self.recipe, progress=self.progress)
        return self._chosen(swept, columns, default_arm(columns, best.multiplier, f"all {best.multiplier:g}"))

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
        columns = fit(self.activations, [], self._recipe_at(best), progress=self.progress, **self._texts)
        strengths = combine(
            lambda arms: self._run(columns, arms)[1:], {name: place.strength for name, place in best.items()}, self.goal
        )
        places = {name: Place(place.sites, strengths[name]) for name, place in best.items()}
        write_places(self.out / "places.json", places)
        swept = self._chosen(replace(swept, places=places), columns, Arm("together", strengths))
        swept = replace(swept, together=swept.chosen.arms[1] if swept.chosen else None)
        self._write(swept)
        return swept

    def _chosen(self, swept: SweepResult, columns: Sequence[Column], arm: Arm) -> SweepResult:
        """With what the sweep comes to, measured beside the unsteered model, token by token, and its gates."""
        evaluation, _ = replace(self.evaluator, examples=EXAMPLES).evaluate(
            self.base, columns, [BASELINE, arm], self.samples, self.split, progress=self.progress
        )
        gates = gate_means(self.activations, columns, tuple(Split))
        return replace(swept, chosen=evaluation, gates=tuple(gates), attributes=self.activations.names)

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
                columns = fit(
                    self.activations, [], self._recipe_at({name: place}), progress=self.progress, **self._texts
                )
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
        sites = self.activations.sites
        each = len(attributes) * len(self.multipliers)
        with progress_bar("sweep", len(sites) * each, "settings", shown=self.progress) as advance:
            found = [
                self._measured(number, site, attributes, lambda share: advance(share * each))
                for number, site in enumerate(sites, start=1)
            ]
        points = [point for swept in found for point in swept.points]
        ranked = sorted(points, key=lambda point: point.rank, reverse=True)
        return SweepResult(ranked, found[0].unsteered, notes=found[0].notes)

    def _measured(self, number: int, site: Site, attributes: Sequence[str | None], advance: Advance) -> SweepResult:
        """The points of one site, measured now or by an earlier call; `advance` is told shares of them."""
        self.say(f"site {number}/{len(self.activations.sites)}: {site}")
        settings = [(attribute, factor) for attribute in attributes for factor in self.multipliers]
        path, key = self.out / "sites" / f"{site}.json", self._key(attributes)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored.get("key") != key:
            columns = [column for attribute in attributes for column in self._fit(site, attribute)]
            arms = [BASELINE, *(_arm(columns, attribute, factor) for attribute, factor in settings)]
            evaluation, texts = self.evaluator.evaluate(
                self.base, columns, arms, self.samples, self.split, kept=path.with_suffix(".partial"), advance=advance
            )
            store_rows(evaluation, texts, path.with_suffix(".jsonl"))
            stored = {"key": key, "arms": [asdict(result) for result in evaluation.arms], "notes": evaluation.notes}
            write_json(path, stored)
        else:
            advance(1)
        unsteered, *measured = map(ArmResult.from_dict, stored["arms"])
        points = [
            self._point(site, attribute, factor, arm, unsteered)
            for (attribute, factor), arm in zip(settings, measured, strict=True)
        ]
        return SweepResult(points, unsteered, notes=tuple(stored.get("notes", ())))

    def _fit(self, site: Site, attribute: str | None) -> Sequence[Column]:
        """All attributes together, or one as if there were no other: at one site they shape each other."""
        if attribute is None:
            return fit(self.activations, [site], self.recipe, **self._texts)
        return fit(self.activations, [], self._recipe_at({attribute: Place((site,), 1.0)}), **self._texts)

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
            damage={name: estimate.value for name, estimate in arm.damage.items()},
            differences=arm.differences,
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
            "prompts": [(prompt.asked, prompt.split, prompt.group) for prompt in self.evaluator.prompts],
            "sampling": asdict(self.evaluator.sampling),
            "limit": self.evaluator.limit,
            "prompting": self.evaluator.prompting.value,
            "damage": self.evaluator.damage,
            "positions": self.evaluator.positions.value,
            "form": self.evaluator.form_for(self.base).value,
            "chat_template": self.base.chat and self.base.chat.describe(),
            "split": self.split.value,
        }
        return content_key(content)


def _listed(sites: Sequence[Site]) -> str:
    return " and ".join(map(str, sites))


def _arm(columns: Sequence[Column], attribute: str | None, factor: float) -> Arm:
    name = f"{attribute or 'all'} {factor:g}"
    return default_arm(columns, factor, name) if attribute is None else Arm(name, {attribute: factor})
