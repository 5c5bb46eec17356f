"""What `make reproduce` has measured, as a page, plots and the README's table: `python -m demo.results`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo.corpus import TRAITS
from demo.readme import RESULTS, replace_between, rewrite
from training.evaluation.report import markdown, markdown_table, marked, save_figure
from training.evaluation.results import DAMAGE, MANY, ArmResult, Estimate, Evaluation, note_on_many

NAMES = (*TRAITS, "well_formed")
# Ground, ink, and a line for each of NAMES: those of the page at /.
LIGHT = ("#ffffff", "#1f2126", "#0d8f85", "#d9730d", "#7c4ddb", "#5b6472")
DARK = ("#1d1f25", "#e9e9ec", "#2dd4bf", "#fb9a4b", "#b79bff", "#a9b4c4")


def write(folder: Path, readme: Path) -> None:
    """Turn `folder`'s results.json into results.md and its plots beside it, and the README's table."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "results.md").write_text(page(results), encoding="utf-8")
    plot_methods(measured(results["methods"]).arms, folder / "methods.png")
    over = Evaluation.from_dict(results["multipliers"])
    plot_multipliers(over, folder / "multipliers.png")
    plot_multipliers(over, folder / "multipliers-dark.png", dark=True)
    replace_between(readme, RESULTS, summary(results["methods"]))


def measured(rows: Sequence[Mapping[str, Any]]) -> Evaluation:
    """The rows of a comparison as arms side by side, named after their methods."""
    return side_by_side([replace(ArmResult.from_dict(line["result"]), arm=line["method"]) for line in rows])


def side_by_side(arms: Sequence[ArmResult], settings: Mapping[str, Any] | None = None) -> Evaluation:
    """Arms of different evaluations, measured on the same prompts, as one."""
    count = sum(len(arm.differences) for arm in arms)
    notes = (note_on_many(count),) if count > MANY else ()
    return Evaluation("generation", tuple(arms), settings or {}, notes)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison for the README: in percent of test answers, without intervals."""
    header = ["method", "strengths", "truthful", "civil", "fair", "well-formed", "perplexity"]
    header += ["repeated 4-grams", "empty", "KL", "gate on neg. / pos."]
    cells = [
        [
            line["method"],
            _strengths(line),
            *(marked(_percent(arm.metrics[name]), arm.differences.get(name)) for name in NAMES),
            f"{arm.perplexity_ratio or 0.0:.2f}x",
            *_damage(arm),
            _gates(line),
        ]
        for line, arm in zip(rows, measured(rows).arms, strict=True)
    ]
    counted = ArmResult.from_dict(rows[0]["result"]).metrics
    asked = ", ".join(f"{counted[name].count:,} for {name} ({counted[name].clusters} clusters)" for name in NAMES)
    return (
        markdown_table(header, cells)
        + f"""
In percent of test answers: {asked.replace("_", "-")}.
**Bold** is better and *italic* worse than unsteered: the 95 % interval of the paired difference, from drawing clusters
(facts and scenes), leaves out zero. Perplexity is that of its own text under the unsteered model; KL is from the
unsteered model on neutral text, in nats a token.
"""
    )


def settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each method was run with, and its gates."""
    return markdown_table(
        ["method", "strengths", "gate on neg. / pos."],
        [[line["method"], _strengths(line), _gates(line)] for line in rows if line["strengths"]],
    )


def _strengths(line: Mapping[str, Any]) -> str:
    return " / ".join(f"{line['strengths'][trait]:.2g}" for trait in TRAITS if line["strengths"])


def _gates(line: Mapping[str, Any]) -> str:
    """Means over the columns."""
    gates = line["gates"]
    means = [sum(gate[side] for gate in gates) / len(gates) for side in ("negative", "positive") if gates]
    return " / ".join(f"{value:.2f}" for value in means)


def _damage(arm: ArmResult) -> list[str]:
    """Shares in percent, the divergence in nats."""
    values = {name: arm.damage[name].value or 0.0 for name in DAMAGE}
    return [f"{value:.2f}" if name == "kl" else f"{100 * value:.1f}" for name, value in values.items()]


def _percent(rate: Estimate) -> str:
    return "-" if rate.value is None else f"{100 * rate.value:.1f}"


def plot_methods(arms: Sequence[ArmResult], path: Path) -> None:
    """A group of bars for each method, a bar for each attribute."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    axes = figure.subplots()
    for place, trait in enumerate(TRAITS):
        ends = [(one.value or 0.0, one.low or 0.0, one.high or 0.0) for one in (arm.metrics[trait] for arm in arms)]
        middles = [100 * value for value, _, _ in ends]
        errors = [[100 * (value - low) for value, low, _ in ends], [100 * (high - value) for value, _, high in ends]]
        places = [index + 0.27 * (place - 1) for index in range(len(arms))]
        axes.bar(places, middles, 0.25, yerr=errors, capsize=2, label=trait)
    axes.set_xticks(range(len(arms)), [arm.arm for arm in arms], rotation=25, ha="right")
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
    found = [(gate["attribute"], gate["negative"], gate["positive"]) for gate in gates]
    cells = [
        [name, f"{negative:.2f}", f"{positive:.2f}", f"{negative / positive:.1f}"] for name, negative, positive in found
    ]
    return markdown_table(["attribute", "gate on negatives", "on positives", "ratio"], cells)


def page(results: dict[str, Any]) -> str:
    """`results.md`."""
    alone = Evaluation.from_dict(results["alone"])
    settings = ", ".join(f"{key} {value}" for key, value in alone.settings.items())
    earlier = (
        " by an earlier run of the command, and taken from it (`--strengths`)" if results["earlier_strengths"] else ""
    )
    return f"""# Results on the demo

Written by `make reproduce`; the numbers are in `results.json`. Every rate is the percentage of sampled answers to
fresh questions about **test** facts and scenes, judged by `demo/oracle.py`; vectors are fitted on train facts,
strengths chosen on dev facts{earlier}. Intervals are 95 %;
questions about one fact, or one scene, are a cluster. The command leaves every answer with its verdict in
`runs/reproduce/answers`: too much for the repository. The neutral text on which KL is measured has words that the
demo's model never saw. Generated with {settings}.

## Methods and ablations, all attributes at once

Strengths are the multipliers of truthfulness, civility and fairness, relative to the vectors as they were fitted (for
the shipped checkpoint: its defaults): the best for each attribute alone on dev, then the best beside the others, with
a perplexity of at most 1.5x and at least 97 % well-formed answers where there is such a setting. Gates are means over
the three attributes, on test activations of their own negatives and positives.

"MAT-Steer" is fitted anew with the shipped checkpoint's recipe, so the two rows should agree. Difference in means is
fitted at the same places, which were chosen for MAT-Steer: at places of its own it may do better. Where every attribute
has a place of its own, orthogonality has nothing to do, and "no orthogonality" repeats "MAT-Steer"; the last two rows
are where it has.

{settings_table(results["methods"])}
{markdown(measured(results["methods"]))}
![Rates of every method](methods.png)

## Objectives

How the losses are reduced (`--objective`), all else as in the shipped checkpoint, measured on **dev**, on which the
default was chosen.

{settings_table(results["objectives"])}
{markdown(measured(results["objectives"]))}
## The shipped checkpoint

One attribute alone, and all together, at the default multipliers:

{markdown(alone)}
Over multipliers of all attributes together:

{markdown(Evaluation.from_dict(results["multipliers"]))}
![Rates over the multiplier](multipliers.png)

Selectivity on test activations: the gate opens on what needs steering.

{gates_table(results["gates"])}"""


if __name__ == "__main__":
    rewrite(__doc__, write)
