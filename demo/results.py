"""What `make reproduce` has measured, as a page, plots and the README's table: `python -m demo.results`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.corpus import TRAITS
from demo.readme import RESULTS, replace_between, rewrite
from training.evaluation.report import markdown, save_figure
from training.evaluation.results import Evaluation

NAMES = (*TRAITS, "well_formed")
# Ground, ink, and a line for each of NAMES: those of the page at /.
LIGHT = ("#ffffff", "#1f2126", "#0d8f85", "#d9730d", "#7c4ddb", "#5b6472")
DARK = ("#1d1f25", "#e9e9ec", "#2dd4bf", "#fb9a4b", "#b79bff", "#a9b4c4")


def write(folder: Path, readme: Path) -> None:
    """Turn `folder`'s results.json into results.md and its plots beside it, and the README's table."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "results.md").write_text(page(results), encoding="utf-8")
    plot_methods(results["methods"], folder / "methods.png")
    over = Evaluation.from_dict(results["multipliers"])
    plot_multipliers(over, folder / "multipliers.png")
    plot_multipliers(over, folder / "multipliers-dark.png", dark=True)
    replace_between(readme, RESULTS, table(results["methods"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as Markdown: percent of test answers, gates on negatives and positives."""
    header = ["method", "strengths", "truthful", "civil", "fair", "well-formed", "perplexity", "gate on neg. / pos."]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for line in rows:
        strength = " / ".join(f"{line['strengths'][trait]:.2g}" for trait in TRAITS if line["strengths"])
        rates = [f"{100 * line['metrics'][name]['value']:.1f}" for name in NAMES]
        gates = [
            sum(gate[side] for gate in line["gates"]) / len(line["gates"]) if line["gates"] else None
            for side in ("negative", "positive")
        ]
        shown = "" if None in gates else " / ".join(f"{value:.2f}" for value in gates)
        cells = [line["method"], strength, *rates, f"{line['perplexity_ratio']:.2f}x", shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_methods(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A group of bars for each method, a bar for each attribute."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplots()
    for place, trait in enumerate(TRAITS):
        found = [line["metrics"][trait] for line in rows]
        middles = [100 * one["value"] for one in found]
        errors = [
            [100 * (one["value"] - one["low"]) for one in found],
            [100 * (one["high"] - one["value"]) for one in found],
        ]
        places = [index + 0.27 * (place - 1) for index in range(len(rows))]
        axes.bar(places, middles, 0.25, yerr=errors, capsize=2, label=trait)
    axes.set_xticks(range(len(rows)), [line["method"] for line in rows], rotation=25, ha="right")
    axes.set_ylabel("percent of test answers")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)


def plot_multipliers(over: Evaluation, path: Path, *, dark: bool = False) -> None:
    """Each attribute's rate over the multiplier of all attributes together, as large as it stands in the README, in
    the page's colours for a light or a dark ground."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ground, ink, *lines = DARK if dark else LIGHT
    arms = sorted(
        ((0.0 if arm is over.arms[0] else float(arm.arm), arm) for arm in over.arms), key=lambda pair: pair[0]
    )
    with rc_context(
        {
            "text.color": ink,
            "axes.edgecolor": ink,
            "axes.labelcolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
            "axes.facecolor": ground,
            "figure.facecolor": ground,
            "font.size": 11,
        }
    ):
        figure = Figure(figsize=(4.8, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, colour in zip(NAMES, lines, strict=True):
            axes.plot(
                [factor for factor, _ in arms],
                [100 * (arm.metrics[name].value or 0.0) for _, arm in arms],
                marker="o",
                color=colour,
                linestyle="--" if name == "well_formed" else "-",
                label=name.replace("_", "-"),
            )
        axes.axvline(0, color=ink, linewidth=0.8, alpha=0.5)
        axes.set_xlabel("multiplier of all attributes")
        axes.set_ylabel("percent of test answers")
        axes.set_ylim(0, 105)
        axes.grid(color=ink, alpha=0.15)
        axes.legend(frameon=False, loc="lower right")
        save_figure(figure, path)


def gates_table(gates: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| attribute | gate on negatives | on positives | ratio |", "| --- | ---: | ---: | ---: |"]
    for gate in gates:
        negative, positive = gate["negative"], gate["positive"]
        lines.append(f"| {gate['attribute']} | {negative:.2f} | {positive:.2f} | {negative / positive:.1f} |")
    return "\n".join(lines) + "\n"


def page(results: dict[str, Any]) -> str:
    """`results.md`."""
    alone = Evaluation.from_dict(results["alone"])
    settings = ", ".join(f"{key} {value}" for key, value in alone.settings.items())
    return f"""# Results on the demo

Written by `make reproduce`; the numbers are in `results.json`. Every rate is the percentage of sampled answers to
fresh questions about **test** facts and scenes, judged by `demo/oracle.py`; vectors are fitted on train facts,
strengths chosen on dev facts. Perplexity is that of the text under the unsteered model, against its own text.
Intervals: 95 %.

## Methods and ablations, all attributes at once

Strengths are the multipliers of truthfulness, civility and fairness, relative to the vectors as they were fitted (for
the shipped checkpoint: its defaults): the best for each attribute alone on dev, then the best beside the others, with
a perplexity of at most 1.5x and at least 97 % well-formed answers where there is such a setting. Gates are means over
the three attributes, on test activations of their own negatives and positives.

"MAT-Steer" is fitted anew with the shipped checkpoint's recipe, so the two rows should agree. Difference in means is
fitted at the same places, which were chosen for MAT-Steer: at places of its own it may do better. Where every attribute
has a place of its own, orthogonality has nothing to do, and "no orthogonality" repeats "MAT-Steer"; the last two rows
are where it has.

{table(results["methods"])}
![Rates of every method](methods.png)

## Objectives

How the losses are reduced (`--objective`), all else as in the shipped checkpoint, measured on **dev**, on which the
default was chosen.

{table(results["objectives"])}
## The shipped checkpoint

One attribute alone, and all together, at the default multipliers ({settings}):

{markdown(alone)}
Over multipliers of all attributes together:

{markdown(Evaluation.from_dict(results["multipliers"]))}
![Rates over the multiplier](multipliers.png)

Selectivity on test activations: the gate opens on what needs steering.

{gates_table(results["gates"])}"""


if __name__ == "__main__":
    rewrite(__doc__, write)
