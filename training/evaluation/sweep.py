"""Layers x sites x multipliers, measured on dev: which setting steers best, by which goal, and how strongly."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from steering.column import Column
from steering.types import Site
from training.activations.store import Activations, samples_hash
from training.data.samples import Sample, Split
from training.errors import TrainingError
from training.evaluation.evaluator import EXAMPLES, Evaluator, gate_means
from training.evaluation.judges import judge_key
from training.evaluation.report import plot_sweep, store_rows, sweep_markdown
from training.evaluation.results import BASELINE, Arm, ArmMeasures, ArmResult, default_arm
from training.evaluation.sweep_results import Goal, Place, SweepPoint, SweepResult, write_places
from training.files import content_key, write_bytes, write_json
from training.methods.fit import Recipe, fit
from training.models import Base
from training.progress import Advance, progress_bar

SCALES = (0.6, 0.8, 1.0, 1.2)
ROUNDS = 2  # of a coordinate ascent
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
    run: Run, alone: Mapping[str, float], goal: Goal, scales: Sequence[float] = SCALES, rounds: int = ROUNDS
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


@dataclass
class _Total:
    """One bar over all stages of a sweep; what a stage turns out not to need counts as done."""

    advance: Advance
    done: float = 0.0

    def tell(self, count: float) -> None:
        self.done += count
        self.advance(count)

    def reach(self, count: float) -> None:
        self.tell(count - self.done)


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
    fitted_texts: Sequence[Sample] = ()
    """Of `activations`, for a method that is trained through the model."""
    progress: bool = False
    say: Say = lambda _: None
    first: "Sweep | None" = None
    """Another one with the same evaluator and samples: its unsteered model is this one's, too."""

    @cached_property
    def unsteered(self) -> ArmMeasures:
        """The model without steering, measured when it is first asked for."""
        if self.first is not None:
            return self.first.unsteered
        evaluation, texts = self.evaluator.evaluate(
            self.base, (), [BASELINE], self.samples, self.split, kept=self.out / "unsteered.partial"
        )
        store_rows(evaluation, texts, self.out / "unsteered.jsonl")
        return evaluation.measures[0]

    def measured(self) -> SweepResult:
        """All attributes at once at every site and multiplier, the best point first.

        Sites that an earlier, interrupted call has measured are read from `out`; `sweep.json`, `sweep.md` and
        `best.json` are written there, and a plot_sweep where matplotlib is installed. Raises TrainingError.
        """
        with self._bar(self._settings([None])) as total:
            return self._measured_together(total)

    def together(self) -> SweepResult:
        """As `measured`, and the best setting beside the unsteered model, with examples."""
        with self._bar(self._settings([None]) + 2) as total:
            swept = self._measured_together(total)
            best = swept.points[0]
            columns = fit(self.activations, [best.place], self.recipe, base=self.base, samples=self.fitted_texts)
            arm = default_arm(columns, best.multiplier, f"all {best.multiplier:g}")
            return self._chosen(swept, columns, arm, total)

    def alone(self, sites_each: int = 1, *, apart: bool = False) -> SweepResult:
        """Each attribute by itself at every site and multiplier, then all at once, every one at its best site, at
        strengths that go together. With more `sites_each`, an attribute takes further sites as long as they help;
        `apart`: none that an attribute before it has. As `together`, with `places.json` for `matsteer train --places`
        beside it."""
        names = self.activations.names
        each, further = self._settings(names), (sites_each - 1) * CANDIDATES * len(self.multipliers)
        most = each + further * len(names) + len(SCALES) + ROUNDS * len(names) * (1 + len(SCALES))
        with self._bar(most + 2) as total:
            swept = self._sweep(names, total)
            self._write(swept)
            best: dict[str, Place] = {}
            for number, name in enumerate(names, start=1):
                taken = {site for place in best.values() for site in place.sites} if apart else set()
                own = [point for point in swept.points if point.attribute == name and point.place not in taken]
                if not own:
                    raise TrainingError(f"No site is left for {name}: sweep more of them, or fewer for each attribute.")
                best[name] = self._best_sites(name, own, sites_each, swept.unsteered, total)
                total.reach(each + number * further)
            self.say(f"together: {', '.join(f'{name} at {_listed(place.sites)}' for name, place in best.items())}")
            stage = _Stage(self, {name: place.sites for name, place in best.items()}, total)
            strengths = combine(stage.run, {name: place.strength for name, place in best.items()}, self.goal)
            total.reach(most)
            places = {name: Place(place.sites, strengths[name]) for name, place in best.items()}
            write_places(self.out / "places.json", places)
            swept = self._chosen(replace(swept, places=places), stage.columns, Arm("together", strengths), total)
        swept = replace(swept, together=swept.chosen.arms[1] if swept.chosen else None)
        self._write(swept)
        return swept

    @contextmanager
    def _bar(self, total: int) -> Iterator[_Total]:
        with progress_bar("sweep", total, "settings", shown=self.progress) as advance:
            yield _Total(advance)

    def _settings(self, attributes: Sequence[str | None]) -> int:
        return len(self.activations.sites) * len(attributes) * len(self.multipliers)

    def _measured_together(self, total: _Total) -> SweepResult:
        swept = self._sweep([None], total)
        self._write(swept)
        write_json(self.out / "best.json", asdict(swept.points[0]))
        return swept

    def _chosen(self, swept: SweepResult, columns: Sequence[Column], arm: Arm, total: _Total) -> SweepResult:
        """With what the sweep comes to, measured beside the unsteered model, token by token, and its gates."""
        evaluation, _ = replace(self.evaluator, examples=EXAMPLES).evaluate(
            self.base, columns, [BASELINE, arm], self.samples, self.split, kept=self.out / "chosen.partial",
            advance=lambda share: total.tell(2 * share),
        )  # fmt: skip
        gates = gate_means(self.activations, columns, tuple(Split))
        return replace(swept, chosen=evaluation, gates=tuple(gates), attributes=self.activations.names)

    def _best_sites(
        self, name: str, points: Sequence[SweepPoint], most: int, unsteered: ArmResult, total: _Total
    ) -> Place:
        """The best of an attribute's `points`, which come best first, and further sites of theirs that help."""
        ranked = list(dict.fromkeys(point.place for point in points))
        there = [point for point in points if point.place == ranked[0]]
        first = there[self.goal.best([point.rank for point in there], [point.multiplier for point in there])]
        chosen, strength, rank = ranked[:1], first.multiplier, first.rank
        while len(chosen) < most:
            tried = []
            for site in [site for site in ranked if site not in chosen][:CANDIDATES]:
                self.say(f"{name} at {_listed((*chosen, site))}")
                stage = _Stage(self, {name: (*chosen, site)}, total)
                results = stage.run(arms_alone([name], self.multipliers))
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

    def fitted(self, sites: Mapping[str, Sequence[Site]]) -> Sequence[Column]:
        """The columns of attributes at their sites."""
        recipe = self.recipe.at({name: tuple(own) for name, own in sites.items()})
        return fit(self.activations, [], recipe, base=self.base, samples=self.fitted_texts)

    def _sweep(self, attributes: Sequence[str | None], total: _Total) -> SweepResult:
        if not self.multipliers:
            raise TrainingError("A sweep needs at least one multiplier.")
        each = len(attributes) * len(self.multipliers)
        found = [
            self._measured(number, site, attributes, lambda share: total.tell(share * each))
            for number, site in enumerate(self.activations.sites, start=1)
        ]
        points = [point for swept in found for point in swept.points]
        ranked = sorted(points, key=lambda point: point.rank, reverse=True)
        return SweepResult(ranked, found[0].unsteered, notes=found[0].notes)

    def _measured(self, number: int, site: Site, attributes: Sequence[str | None], advance: Advance) -> SweepResult:
        """The points of one site, measured now or by an earlier call; `advance` is told shares of them."""
        self.say(f"site {number}/{len(self.activations.sites)}: {site}")
        settings = [(attribute, factor) for attribute in attributes for factor in self.multipliers]
        path, key = self.out / "sites" / f"{site}.json", self.key(attributes)
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored.get("key") != key:
            columns = [column for attribute in attributes for column in self._fit(site, attribute)]
            arms = [_arm(columns, attribute, factor) for attribute, factor in settings]
            evaluation, texts = self.evaluator.evaluate(
                self.base, columns, arms, self.samples, self.split, before=self.unsteered,
                kept=path.with_suffix(".partial"), advance=advance,
            )  # fmt: skip
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
            return fit(self.activations, [site], self.recipe, base=self.base, samples=self.fitted_texts)
        return self.fitted({attribute: (site,)})

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
        write_bytes(self.out / "sweep.md", sweep_markdown(swept, swept.remarks(self.goal)).encode())
        plot_sweep(swept.points, self.out / "sweep.png")

    def key(self, attributes: Sequence[str | None]) -> str:
        content = {
            "first arm": BASELINE.name,
            "activations": dict(self.activations.source),
            "samples": samples_hash(self.samples),
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


@dataclass(frozen=True)
class _Stage:
    """Attributes at their sites, and what was measured of them there, which is kept for a later call."""

    sweep: Sweep
    sites: Mapping[str, Sequence[Site]]
    total: _Total

    @cached_property
    def columns(self) -> Sequence[Column]:
        return self.sweep.fitted(self.sites)

    def run(self, arms: Sequence[Arm]) -> list[ArmResult]:
        """The result of each arm, measured now or before."""
        places = {name: [*map(str, sites)] for name, sites in self.sites.items()}
        key = content_key([places, self.sweep.key(list(places))])
        path = self.sweep.out / "stages" / f"{key}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        wanted = [arm for arm in arms if _setting(arm) not in stored]
        self.total.tell(len(arms) - len(wanted))
        if wanted:
            evaluation, _ = self.sweep.evaluator.evaluate(
                self.sweep.base, self.columns, wanted, self.sweep.samples, self.sweep.split,
                before=self.sweep.unsteered, kept=path.with_suffix(".partial"),
                advance=lambda share: self.total.tell(share * len(wanted)),
            )  # fmt: skip
            found = zip(wanted, evaluation.arms[1:], strict=True)
            stored |= {_setting(arm): asdict(result) for arm, result in found}
            write_json(path, stored)
        return [ArmResult.from_dict(stored[_setting(arm)]) for arm in arms]


def _setting(arm: Arm) -> str:
    return json.dumps(dict(sorted(arm.attributes.items())))
