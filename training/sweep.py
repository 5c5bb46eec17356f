"""Layers x sites x multipliers, measured on dev: which setting steers best."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from steering.types import Site
from training.activations import Activations
from training.arms import BASELINE, default_arm
from training.data.records import Sample, Split
from training.errors import TrainingError
from training.files import content_key, write_bytes, write_json
from training.fit import Recipe, fit
from training.judges import judge_key
from training.measure import Measure
from training.models import Base
from training.report import save_figure
from training.results import ArmResult


@dataclass(frozen=True)
class Point:
    """One setting of the sweep. `score` is the mean of the metrics that count."""

    layer: int
    site: str
    multiplier: float
    score: float
    metrics: dict[str, float | None]
    perplexity_ratio: float | None
    fluent: bool
    """The perplexity ratio is within the limit."""


@dataclass(frozen=True)
class Goal:
    """What the best setting is best at."""

    metrics: tuple[str, ...] = ()
    """Those that count; none: every judged metric, or every mc2."""
    max_perplexity_ratio: float = 1.5


def sweep(
    base: Base,
    samples: Sequence[Sample],
    activations: Activations,
    recipe: Recipe,
    multipliers: Sequence[float],
    measure: Measure,
    out: Path,
    *,
    goal: Goal | None = None,
    split: Split = Split.DEV,
    progress: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Fit at every extracted site and measure every multiplier (of all attributes together), the best point first.

    Sites that an earlier, interrupted call has measured are read from `out`; `sweep.json`, `sweep.md` and `best.json`
    are written there at the end, and a plot where matplotlib is installed. Raises TrainingError without multipliers.
    """
    if not multipliers:
        raise TrainingError("A sweep needs at least one multiplier.")
    goal = goal or Goal()
    points = []
    for number, site in enumerate(activations.sites, start=1):
        say(f"site {number}/{len(activations.sites)}: {site}")
        key = _key(activations, recipe, multipliers, measure, split)
        arms = _measured(out / "sites" / f"{site}.json", key)
        if arms is None:
            columns = fit(activations, [site], recipe, progress=progress)
            asked = [BASELINE, *(default_arm(columns, factor, f"{factor:g}") for factor in multipliers)]
            evaluation, _ = measure.run(base, columns, asked, samples, split, progress=progress)
            arms = [_plain(arm) for arm in evaluation.arms[1:]]
            write_json(out / "sites" / f"{site}.json", {"key": key, "arms": arms})
        points += [_point(site, factor, arm, goal) for factor, arm in zip(multipliers, arms, strict=True)]
    points.sort(key=lambda point: (not point.fluent, -point.score))
    write_json(out / "sweep.json", [asdict(point) for point in points])
    write_json(out / "best.json", asdict(points[0]))
    write_bytes(out / "sweep.md", markdown(points).encode())
    plot(points, out / "sweep.png")
    return points


def rich_table(points: Sequence[Point], rows: int = 20) -> Table:
    table = Table(title="sweep, best first", caption=f"{min(rows, len(points))} of {len(points)} settings")
    header, cells = _cells(points[:rows])
    for name in header:
        table.add_column(name, justify="right")
    for line in cells:
        table.add_row(*line)
    return table


def markdown(points: Sequence[Point]) -> str:
    header, cells = _cells(points)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---:"] * len(header), *cells]) + "\n"


def plot(points: Sequence[Point], path: Path) -> bool:
    """Score against multiplier, a line for each site. False, and no plot, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for layer, site in sorted({(point.layer, point.site) for point in points}):
        own = sorted((p for p in points if (p.layer, p.site) == (layer, site)), key=lambda p: p.multiplier)
        axes.plot([p.multiplier for p in own], [100 * p.score for p in own], marker="o", label=f"{layer}.{site}")
    axes.set_xlabel("multiplier")
    axes.set_ylabel("score, percent")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
    return True


def _cells(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    rows = [
        [
            str(point.layer),
            point.site,
            f"{point.multiplier:g}",
            f"{100 * point.score:.1f}",
            *("-" if (value := point.metrics.get(name)) is None else f"{100 * value:.1f}" for name in names),
            "-" if point.perplexity_ratio is None else f"{point.perplexity_ratio:.2f}",
        ]
        for point in points
    ]
    return ["layer", "site", "multiplier", "score", *names, "perplexity ratio"], rows


def _point(site: Site, factor: float, arm: dict[str, Any], goal: Goal) -> Point:
    metrics: dict[str, float | None] = arm["metrics"]
    missing = [name for name in goal.metrics if name not in metrics]
    if missing:
        raise TrainingError(f"There is no metric {missing[0]!r}; there are {', '.join(metrics)}.")
    names = goal.metrics or [name for name in metrics if name.endswith(" mc2")] or list(metrics)
    values = [value for name in names if (value := metrics[name]) is not None]
    ratio = arm["perplexity_ratio"]
    return Point(
        layer=site.layer,
        site=site.kind.value,
        multiplier=factor,
        score=sum(values) / len(values) if values else 0.0,
        metrics=metrics,
        perplexity_ratio=ratio,
        fluent=ratio is None or ratio <= goal.max_perplexity_ratio,
    )


def _plain(arm: ArmResult) -> dict[str, Any]:
    return {
        "metrics": {name: estimate.value for name, estimate in arm.metrics.items()},
        "perplexity_ratio": arm.perplexity_ratio,
    }


def _measured(path: Path, key: str) -> list[dict[str, Any]] | None:
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    return stored["arms"] if stored["key"] == key else None


def _key(activations: Activations, recipe: Recipe, multipliers: Sequence[float], measure: Measure, split: Split) -> str:
    content = {
        "activations": dict(activations.source),
        "recipe": recipe.as_dict(),
        "multipliers": list(multipliers),
        "judge": measure.judge and judge_key(measure.judge),
        "prompts": [(prompt.text, prompt.split) for prompt in measure.prompts],
        "sampling": asdict(measure.sampling),
        "limit": measure.limit,
        "positions": measure.positions.value,
        "split": split.value,
    }
    return content_key(content)
