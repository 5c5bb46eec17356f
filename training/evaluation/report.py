"""An evaluation, or a sweep, as a terminal table, as Markdown, as JSON and as a plot."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from training.errors import TrainingError
from training.evaluation.generation import Continuation
from training.evaluation.results import DAMAGE, ArmResult, Estimate, Evaluation
from training.evaluation.sweep_results import SweepPoint, SweepResult
from training.files import write_bytes, write_json

log = logging.getLogger(__name__)

WIDE = 6  # columns of numbers


Rows = tuple[list[str], list[list[str]]]
"""Header and rows."""


def tables(evaluation: Evaluation) -> dict[str, Rows]:
    """Title -> one row an arm: metrics in percent, their differences to the unsteered arm, and what is damaged."""
    names, damaged = evaluation.metrics, [arm for arm in evaluation.arms if arm.perplexity is not None or arm.damage]
    found: dict[str, Rows] = {
        "": (
            ["arm", *names],
            [[arm.arm, *(_cell(arm.metrics.get(name)) for name in names)] for arm in evaluation.arms],
        )
    }
    first = evaluation.arms[0]
    counts = ["of", *(_counted(first.metrics.get(name)) for name in names)]
    found[""][1].append(counts)
    if apart := [arm for arm in evaluation.arms if arm.differences]:
        rows = [[arm.arm, *(_cell(arm.differences.get(name), signed=True) for name in names)] for arm in apart]
        found["difference to unsteered"] = ["arm", *names], rows
    if damaged:
        header = ["arm", "perplexity", "ratio", *(name for name in DAMAGE if any(name in a.damage for a in damaged))]
        found["damage"] = header, [[arm.arm, *_damage(arm, header[3:])] for arm in damaged]
    return found


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    return "-" if estimate is None else estimate.text(signed=signed)


def _counted(estimate: Estimate | None) -> str:
    """How many questions, and how many clusters of them."""
    if estimate is None:
        return "-"
    return f"{estimate.count}, {estimate.clusters} clusters" if estimate.clusters else str(estimate.count)


def _damage(arm: ArmResult, names: Sequence[str]) -> list[str]:
    numbers = ["-" if value is None else f"{value:.2f}" for value in (arm.perplexity, arm.perplexity_ratio)]
    numbers[1] = with_range(numbers[1], arm.perplexity_range)
    for name in names:
        one = arm.damage.get(name)
        scale, digits = (1, 3) if name == "kl" else (100, 1)
        numbers.append("-" if one is None else one.text(scale=scale, digits=digits))
    return numbers


def show(evaluation: Evaluation, title: str) -> Group:
    """All tables, and the notes, for a terminal."""
    parts: list[RenderableType] = []
    for name, whole in tables(evaluation).items():
        for header, rows in _apart(whole):
            table = Table(title=f"{title}: {name}" if name else title, caption=_CAPTIONS[name])
            for column in header:
                table.add_column(column, justify="left" if column == "arm" else "right")
            for row in rows:
                table.add_row(*row)
            parts.append(table)
    return Group(*parts, *(Text(f"note: {note}") for note in evaluation.notes))


def _apart(whole: Rows) -> Iterator[Rows]:
    """A table of each attribute, where all of their columns are too many for a terminal."""
    header, rows = whole
    if len(header) - 1 <= WIDE:
        yield whole
        return
    for attribute in dict.fromkeys(name.rpartition(" ")[0] for name in header[1:]):
        places = [0, *(i for i, name in enumerate(header) if i and name.rpartition(" ")[0] == attribute)]
        yield [header[i] for i in places], [[row[i] for i in places] for row in rows]


_CAPTIONS = {
    "": "Percent with 95 % intervals.",
    "difference to unsteered": "Points, paired, with 95 % intervals from drawing clusters (questions, or templates).",
    "damage": "Perplexity of its own texts under the unsteered model, ratio against the first arm's; rep-4 (repeated "
    "token 4-grams) and empty texts in percent; KL to the unsteered model on neutral text, nats a token.",
}


def terminal() -> Console:
    """Standard output; where it is no terminal, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """The first `words` columns hold words, the others numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def with_range(text: str, ends: Sequence[float] | None) -> str:
    """A ratio with the ends of its interval, where it has one."""
    return text + (" [{:.2f}, {:.2f}]".format(*ends) if ends else "")


def marked(text: str, difference: Estimate | None) -> str:
    """Bold where the difference to unsteered is surely above zero, italic where it is surely below."""
    if difference is None or difference.low is None or difference.high is None:
        return text
    return f"**{text}**" if difference.low > 0 else f"*{text}*" if difference.high < 0 else text


def markdown(evaluation: Evaluation) -> str:
    parts = []
    for name, (header, rows) in tables(evaluation).items():
        table = markdown_table(header, rows)
        parts.append(f"{name.capitalize()}. {_CAPTIONS[name]}\n\n{table}" if name else table)
    return "\n".join([*parts, *(f"- {note}\n" for note in evaluation.notes)])


def store(
    evaluation: Evaluation, folder: Path, *, name: str = "evaluation", texts: Sequence[Continuation] = ()
) -> list[Path]:
    """Write JSON, Markdown, what was measured of every question or text (JSON lines) and, where matplotlib is there, a
    plot; what was written."""
    written = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(written[0], evaluation.as_dict())
    write_bytes(written[1], markdown(evaluation).encode())
    rows = folder / ("generations.jsonl" if texts else "questions.jsonl")
    if store_rows(evaluation, texts, rows):
        written.append(rows)
    if plot(evaluation, folder / f"{name}.png"):
        written.append(folder / f"{name}.png")
    return written


def store_rows(evaluation: Evaluation, texts: Sequence[Continuation], path: Path) -> bool:
    """Write the texts with their verdicts, or what was measured of every question, as JSON lines; False where there is
    neither."""
    rows: list[Mapping[str, Any]] = list(evaluation.rows)
    rows += [
        {
            "arm": t.arm,
            **({"attribute": t.attribute} if t.attribute else {}),
            "prompt": t.prompt,
            "asked": t.asked,
            "sample": t.sample,
            "text": t.text,
            "nll": t.nll,
            "verdict": t.verdict,
        }
        for t in texts
    ]
    if rows:
        write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return bool(rows)


def plot(evaluation: Evaluation, path: Path) -> bool:
    """A bar for every arm and metric, with intervals, and beside them what each arm damages. False, and no plot,
    without matplotlib."""
    if not can_plot():
        return False
    from matplotlib.figure import Figure

    names, arms = evaluation.metrics, evaluation.arms
    ratios = [
        None if (one := arm.perplexity_ratio) is None else Estimate(one, *(arm.perplexity_range or (one, one)), 1)
        for arm in arms
    ]
    gain: _Bars = {name: [arm.metrics.get(name) for arm in arms] for name in names}
    shares: _Bars = {name: [arm.damage.get(name) for arm in arms] for name in DAMAGE if name != "kl"}
    others: _Bars = {"perplexity ratio": ratios, "kl": [arm.damage.get("kl") for arm in arms]}
    panels = [("percent", 100.0, 105.0, gain)]
    panels += [
        (label, scale, top, bars)
        for label, scale, top, bars in (
            ("damage, percent", 100.0, 5.0, shares),
            ("damage, times or nats a token", 1.0, 1.2, others),
        )
        if any(one for own in bars.values() for one in own)
    ]
    rows = f"00;1{len(panels) - 1}" if len(panels) > 1 else "00"
    size = max(8.0, 1.2 * len(names) + 0.35 * len(names) * len(arms)), 4.0 * min(2, len(panels))
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplot_mosaic(rows)
    for place, (label, scale, top, bars) in enumerate(panels):
        axes = every[str(place)]
        _draw_bars(axes, [arm.arm for arm in arms], bars, scale)
        axes.set_ylabel(label)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]) if place == 0 else 0.0, max(top, axes.get_ylim()[1]))
    every["0"].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
    return True


_Bars = dict[str, list[Estimate | None]]
"""What is measured -> one for each arm."""


def _draw_bars(axes: Any, arms: Sequence[str], bars: _Bars, scale: float) -> None:
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        found = [(place, e) for place, own in enumerate(bars.values()) if (e := own[index]) and e.count]
        places = [place - 0.4 + (index + 0.5) * width for place, _ in found]
        middles = [scale * (e.value or 0.0) for _, e in found]
        below = [scale * max(0.0, (e.value or 0.0) - (e.low or 0.0)) for _, e in found]
        above = [scale * max(0.0, (e.high or 0.0) - (e.value or 0.0)) for _, e in found]
        axes.bar(places, middles, width, yerr=[below, above], capsize=2, label=arm)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


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
    header, cells = sweep_rows(swept, best)
    for name in header:
        table.add_column(name, justify="right")
    for line in cells:
        table.add_row(*line)
    return table


def sweep_markdown(swept: SweepResult, remarks: Iterable[str] = ()) -> str:
    header, cells = sweep_rows(swept, swept.points)
    return "\n".join([markdown_table(header, cells, words=0), *(f"- {remark}\n" for remark in remarks)])


def plot_sweep(points: Sequence[SweepPoint], path: Path) -> bool:
    """Score against multiplier, a line for each site and attribute, and beside it the damage. False, and no plot,
    without matplotlib."""
    if not can_plot():
        return False
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[SweepPoint], float | None]]] = [
        ("score, percent", lambda point: 100 * point.score),
        ("perplexity ratio", lambda point: point.perplexity_ratio),
        ("KL on neutral text, nats a token", lambda point: point.damage.get("kl")),
    ]
    shown = [(label, of) for label, of in panels if any(of(point) is not None for point in points)]
    figure = Figure(figsize=(2.5 + 5 * len(shown), 4.5), layout="constrained")
    every = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (label, of) in zip(every, shown, strict=True):
        for line in sorted({(point.attribute or "", point.layer, point.site) for point in points}):
            own = sorted(
                (p for p in points if (p.attribute or "", p.layer, p.site) == line), key=lambda point: point.multiplier
            )
            found = [(p.multiplier, value) for p in own if (value := of(p)) is not None]
            name = f"{line[0]} {line[1]}.{line[2]}".strip()
            axes.plot([x for x, _ in found], [y for _, y in found], marker="o", label=name)
        axes.set_xlabel("multiplier")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    every[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
    return True


def sweep_rows(swept: SweepResult, points: Sequence[SweepPoint]) -> tuple[list[str], list[list[str]]]:
    names = list(swept.unsteered.metrics)
    counts = [str(estimate.count) for estimate in swept.unsteered.metrics.values()]
    clusters = [str(estimate.clusters or "-") for estimate in swept.unsteered.metrics.values()]
    blank = [""] * (len(DAMAGE) + 1)
    rows = [
        ["cases", "", "", "", "", *counts, *blank],
        ["clusters", "", "", "", "", *clusters, *blank],
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
            *(_moved(point.metrics.get(name), point.differences.get(name)) for name in names),
            "-" if point.perplexity_ratio is None else f"{point.perplexity_ratio:.2f}",
            *(_harm(name, point.damage.get(name)) for name in DAMAGE),
        ]
        for point in points
    ]
    return ["attribute", "layer", "site", "multiplier", "score", *names, "perplexity ratio", *DAMAGE], rows


def _arm_row(name: str, arm: ArmResult) -> list[str]:
    ratio = "-" if arm.perplexity_ratio is None else f"{arm.perplexity_ratio:.2f}"
    metrics = (_moved(one.value, arm.differences.get(key)) for key, one in arm.metrics.items())
    harm = (_harm(key, one.value if (one := arm.damage.get(key)) else None) for key in DAMAGE)
    return [name, "", "", "", "", *metrics, ratio, *harm]


def _moved(value: float | None, difference: Estimate | None) -> str:
    """A metric, and its difference to the unsteered model with the interval."""
    return _percent(value) + (f" ({difference.text(signed=True)})" if difference else "")


def _harm(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if name == "kl" else _percent(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
