"""An evaluation, or a sweep, as a terminal table, as Markdown, as JSON and as a plot."""

import logging
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.errors import TrainingError
from training.evaluation.generation import Continuation
from training.evaluation.results import ArmResult, Evaluation
from training.evaluation.sweep_results import SweepPoint, SweepResult
from training.files import write_bytes, write_json

log = logging.getLogger(__name__)


def table_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and one row an arm: rates in percent with their 95 % intervals."""
    judged = evaluation.kind == "generation"
    header = ["arm", *evaluation.metrics, *(["perplexity", "ratio"] if judged else [])]
    rows = []
    for arm in evaluation.arms:
        cells = [arm.metrics[name].text() if name in arm.metrics else "-" for name in evaluation.metrics]
        if judged:
            cells += ["-" if value is None else f"{value:.2f}" for value in (arm.perplexity, arm.perplexity_ratio)]
        rows.append([arm.arm, *cells])
    return header, rows


def rich_table(evaluation: Evaluation, title: str) -> Table:
    header, rows = table_rows(evaluation)
    table = Table(title=title, caption="Percent with 95 % intervals.")
    for name in header:
        table.add_column(name, justify="left" if name == "arm" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def terminal() -> Console:
    """Standard output; where it is no terminal, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def markdown(evaluation: Evaluation) -> str:
    header, rows = table_rows(evaluation)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def store(
    evaluation: Evaluation, folder: Path, *, name: str = "evaluation", texts: Sequence[Continuation] = ()
) -> list[Path]:
    """Write JSON, Markdown, the texts (JSON lines) and, where matplotlib is there, a plot; what was written."""
    written = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(written[0], evaluation.as_dict())
    write_bytes(written[1], markdown(evaluation).encode())
    if texts:
        write_texts(folder / "generations.jsonl", texts)
        written.append(folder / "generations.jsonl")
    if plot(evaluation, folder / f"{name}.png"):
        written.append(folder / f"{name}.png")
    return written


def write_texts(path: Path, texts: Sequence[Continuation]) -> None:
    import json

    rows = [{"arm": t.arm, "prompt": t.prompt, "sample": t.sample, "text": t.text, "nll": t.nll} for t in texts]
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def plot(evaluation: Evaluation, path: Path) -> bool:
    """A bar for every arm and metric, with intervals. False, and no plot, without matplotlib."""
    if not can_plot():
        return False
    from matplotlib.figure import Figure

    names, arms = evaluation.metrics, evaluation.arms
    figure = Figure(figsize=(max(6.0, 1.2 * len(names) + 0.35 * len(names) * len(arms)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        found = [(place, e) for place, name in enumerate(names) if (e := arm.metrics.get(name)) and e.count]
        places = [place - 0.4 + (index + 0.5) * width for place, _ in found]
        middles = [100 * (e.value or 0.0) for _, e in found]
        below = [100 * max(0.0, (e.value or 0.0) - (e.low or 0.0)) for _, e in found]
        above = [100 * max(0.0, (e.high or 0.0) - (e.value or 0.0)) for _, e in found]
        axes.bar(places, middles, width, yerr=[below, above], capsize=2, label=arm.arm)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("percent")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
    return True


@cache
def can_plot() -> bool:
    """Whether matplotlib is installed; where it is not, says once how to install it."""
    if find_spec("matplotlib") is None:
        log.warning("There are no plots, for want of matplotlib: pip install 'matplotlib>=3.9'.")
        return False
    return True


def save_figure(figure: object, path: Path) -> None:
    """Write a matplotlib figure. Raises TrainingError where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)  # type: ignore[attr-defined]
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}.") from None


def sweep_table(swept: SweepResult, rows: int = 20) -> Table:
    """The best of them, as many of each attribute that was steered alone, beside the unsteered model."""
    points = swept.points
    attributes = dict.fromkeys(point.attribute for point in points)
    each = max(1, rows // max(1, len(attributes)))
    best = [point for name in attributes for point in [p for p in points if p.attribute == name][:each]]
    table = Table(title="sweep, best first", caption=f"{len(best)} of {len(points)} settings")
    header, cells = _sweep_rows(swept, best)
    for name in header:
        table.add_column(name, justify="right")
    for line in cells:
        table.add_row(*line)
    return table


def sweep_markdown(swept: SweepResult) -> str:
    header, cells = _sweep_rows(swept, swept.points)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---:"] * len(header), *cells]) + "\n"


def plot_sweep(points: Sequence[SweepPoint], path: Path) -> bool:
    """Score against multiplier, a line for each site and attribute. False, and no plot_sweep, without matplotlib."""
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


def _sweep_rows(swept: SweepResult, points: Sequence[SweepPoint]) -> tuple[list[str], list[list[str]]]:
    names = list(swept.unsteered.metrics)
    counts = [str(estimate.count) for estimate in swept.unsteered.metrics.values()]
    rows = [
        ["cases", "", "", "", "", *counts, ""],
        _arm_row("unsteered", swept.unsteered),
        *([_arm_row("together", swept.together)] if swept.together else []),
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


def _arm_row(name: str, arm: ArmResult) -> list[str]:
    ratio = "-" if arm.perplexity_ratio is None else f"{arm.perplexity_ratio:.2f}"
    return [name, "", "", "", "", *(_percent(estimate.value) for estimate in arm.metrics.values()), ratio]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
