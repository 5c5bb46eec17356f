"""A place for steering, looked for on dev by what steering there does: `matsteer train` without a layer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from steering.errors import UnsupportedArchitecture
from steering.sites import layers, site_module
from steering.types import Site, SiteKind
from training.activations.store import Activations
from training.data.samples import Sample, Split
from training.errors import DataError
from training.evaluation.evaluator import Evaluator
from training.evaluation.results import Estimate
from training.evaluation.sweep import Sweep
from training.evaluation.sweep_results import Goal, SweepPoint, SweepResult, check_goal
from training.methods.fit import Recipe
from training.models import Base

DEPTHS = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the model's layers
KINDS = (SiteKind.ATTN_OUTPUT, SiteKind.RESIDUAL)
MULTIPLIERS = (1.0, 2.0)
STRONGER = (1.5, 2.0)  # times the largest of them, where that is the best
SHOWN = 5  # settings that are told
DAMAGE = 8  # questions that are answered, to see what steering breaks
CASES = 40  # questions of an attribute, or prompts
EPOCHS = 20  # at most, of a fit that is only to be compared
MOVED = 0.005  # half a point: less is no change of a score

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidates:
    """Where to look: `layers` and `kinds`, all that there are of what is None."""

    layers: tuple[int, ...] | None = None
    kinds: tuple[SiteKind, ...] | None = None

    def sites(self, model: Any) -> tuple[Site, ...]:
        """Of a loaded model: layers from 20 to 80 % of its depth. Raises UnsupportedArchitecture where it has no such
        site."""
        count = len(layers(model))
        numbers = self.layers or tuple(dict.fromkeys(round(depth * (count - 1)) for depth in DEPTHS))
        there = [kind for kind in self.kinds or KINDS if self.kinds or _has(model, Site(numbers[0], kind))]
        return tuple(Site(number, kind) for number in numbers for kind in there)

    def among(self, stored: Sequence[Site]) -> tuple[Site, ...]:
        """Of the sites of stored activations."""
        return tuple(
            site
            for site in stored
            if (self.layers is None or site.layer in self.layers) and (self.kinds is None or site.kind in self.kinds)
        )


def _has(model: Any, site: Site) -> bool:
    try:
        site_module(model, site)
    except UnsupportedArchitecture:
        return False
    return True


def search_goal(names: Iterable[str], metrics: Sequence[str] = ()) -> Goal:
    """What a place for these attributes is looked for by: the `metrics`, or theirs."""
    return Goal(tuple(metrics), tolerance=MOVED, attributes=tuple(names))


def check_search(evaluator: Evaluator, samples: Sequence[Sample], goal: Goal) -> None:
    """Raises TrainingError where nothing on dev can tell one place from another."""
    check_goal(goal, evaluator)
    try:
        evaluator.check(samples, Split.DEV)
    except DataError as error:
        raise DataError(
            f"--layer is missing, and on dev there is nothing to find a place by: {str(error).rstrip('.')}; or name a "
            "layer and a site."
        ) from None


def find_place(
    base: Base,
    samples: Sequence[Sample],
    activations: Activations,
    sites: Sequence[Site],
    recipe: Recipe,
    evaluator: Evaluator,
    goal: Goal,
    out: Path,
    *,
    fitted_texts: Sequence[Sample] = (),
    progress: bool = False,
    say: Say = lambda _: None,
) -> SweepPoint:
    """The site and multiplier of `sites` and `MULTIPLIERS` that are best for all attributes at once, on a part of dev
    after short fits; the weaker one of two that are alike. Where the largest multiplier is the best, larger ones are
    tried at its site. `fitted_texts`: as a `Sweep` has them. What was measured is kept in `out`, as by a sweep."""

    def at(sites: Sequence[Site]) -> Activations:
        return replace(activations, values={site: activations.at(site) for site in sites})

    sweep = Sweep(
        base, samples, at(sites), _short(recipe), MULTIPLIERS, quick(evaluator), out, goal, fitted_texts=fitted_texts,
        progress=progress, say=say,
    )  # fmt: skip
    swept = sweep.measured()
    best = _best(goal, swept.points)
    if best.multiplier == max(MULTIPLIERS) and best.shortfall == 0:
        more = [factor * best.multiplier for factor in STRONGER]
        say(f"{best.place} is best at the largest multiplier: trying {' and '.join(f'{x:g}' for x in more)}")
        stronger = replace(sweep, activations=at([best.place]), multipliers=more, out=out / "stronger", first=sweep)
        swept = replace(swept, points=[*swept.points, *stronger.measured().points])
        best = _best(goal, swept.points)
    _tell(goal, swept, best, out, say)
    return best


def _best(goal: Goal, points: Sequence[SweepPoint]) -> SweepPoint:
    return points[goal.best([point.rank for point in points], [point.multiplier for point in points])]


def _tell(goal: Goal, swept: SweepResult, best: SweepPoint, out: Path, say: Say) -> None:
    """What was chosen among what, and what a reader should know of it."""
    scores = f"{100 * goal.score(swept.unsteered):.1f} -> {100 * best.score:.1f}"
    say(f"place: {best.place}, multiplier {best.multiplier:g}: score {scores} on dev")
    ranked = sorted(swept.points, key=lambda point: point.rank, reverse=True)
    listed = ", ".join(f"{one.place} x{one.multiplier:g} {100 * one.score:.1f}" for one in ranked[:SHOWN])
    say(f"best of what was tried: {listed}; all of it: {out / 'sweep.md'}")
    if best.shortfall:
        say(
            "warning: every place and multiplier breaks the text beyond a limit, and this one least: read some of its "
            "texts, and try less of it (--strength 0.5) or other layers."
        )
    gains = goal.gains(swept.unsteered, best.differences)
    if not any(one.low is not None and one.low > 0 for one in gains.values()):
        told = ", ".join(f"{name} {one.text(signed=True)}" for name, one in gains.items())
        say(
            f"note: on dev no gain there is more than chance ({told}): more data, a larger --limit, or a place that is "
            "known to work (--layer and --site) may serve better."
        )
    for remark in swept.remarks(goal):
        say(f"note: {remark}")


def quick(evaluator: Evaluator) -> Evaluator:
    """The same on at most `CASES` prompts, once each, or questions of an attribute."""
    limit, damage = min(evaluator.limit or CASES, CASES), min(evaluator.damage, DAMAGE)
    return replace(evaluator, limit=limit, damage=damage, sampling=replace(evaluator.sampling, samples=1))


def unmoved(differences: Iterable[Estimate]) -> bool:
    """Whether no score differs by half a point."""
    return all(abs(one.value or 0.0) < MOVED for one in differences)


def more_than_chance(differences: Iterable[Estimate]) -> bool:
    """Whether some score differs by half a point and surely: its interval leaves out zero."""
    return any(not unmoved([one]) and ((one.low or 0.0) > 0 or (one.high or 0.0) < 0) for one in differences)


def _short(recipe: Recipe) -> Recipe:
    config: Any = recipe.config
    if "epochs" not in {field.name for field in fields(config)}:
        return recipe
    return replace(recipe, config=replace(config, epochs=min(config.epochs, EPOCHS)))
