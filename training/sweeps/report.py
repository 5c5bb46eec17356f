"""A sweep's points as a table and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from training.evaluation.report import can_plot, save_figure
from training.evaluation.results import ArmResult

if TYPE_CHECKING:
    from training.sweeps.sweep import Point, Swept


def rich_table(swept: "Swept", rows: int = 20) -> Table:
    """The best of them, as many of each attribute that was steered alone, beside the unsteered model."""
    points = swept.points
    attributes = dict.fromkeys(point.attribute for point in points)
    each = max(1, rows // max(1, len(attributes)))
    best = [point for name in attributes for point in [p for p in points if p.attribute == name][:each]]
    table = Table(title="sweep, best first", caption=f"{len(best)} of {len(points)} settings")
    header, cells = _cells(swept, best)
    for name in header:
        table.add_column(name, justify="right")
    for line in cells:
        table.add_row(*line)
    return table


def markdown(swept: "Swept") -> str:
    header, cells = _cells(swept, swept.points)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---:"] * len(header), *cells]) + "\n"


def plot(points: Sequence["Point"], path: Path) -> bool:
    """Score against multiplier, a line for each site and attribute. False, and no plot, without matplotlib."""
    if not can_plot():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in sorted({(point.attribute or "", point.layer, point.site) for point in points}):
        own = sorted(
            (p for p in points if (p.attribute or "", p.layer, p.site) == line), key=lambda point: point.multiplier
        )
        name = f"{line[0]} {line[1]}.{line[2]}".strip()
        axes.plot([p.multiplier for p in own], [100 * p.score for p in own], marker="o", label=name)
    axes.set_xlabel("multiplier")
    axes.set_ylabel("score, percent")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
    return True


def _cells(swept: "Swept", points: Sequence["Point"]) -> tuple[list[str], list[list[str]]]:
    names = list(swept.unsteered.metrics)
    counts = [str(estimate.count) for estimate in swept.unsteered.metrics.values()]
    rows = [
        ["cases", "", "", "", "", *counts, ""],
        _beside("unsteered", swept.unsteered),
        *([_beside("together", swept.together)] if swept.together else []),
    ]
    rows += [
        [
            point.attribute or "all",
            str(point.layer),
            point.site,
            f"{point.multiplier:g}",
            f"{100 * point.score:.1f}",
            *(_percent(point.metrics.get(name)) for name in names),
            "-" if point.perplexity_ratio is None else f"{point.perplexity_ratio:.2f}",
        ]
        for point in points
    ]
    return ["attribute", "layer", "site", "multiplier", "score", *names, "perplexity ratio"], rows


def _beside(name: str, arm: ArmResult) -> list[str]:
    ratio = "-" if arm.perplexity_ratio is None else f"{arm.perplexity_ratio:.2f}"
    return [name, "", "", "", "", *(_percent(estimate.value) for estimate in arm.metrics.values()), ratio]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
