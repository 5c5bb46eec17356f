"""The comparison of the paper's tables, on the demo: `make reproduce`.

The unsteered model, difference in means, MAT-Steer and its ablations (arXiv 2502.12446), fitted on train, every
attribute at the strength that is best for it on dev, measured on test with all attributes at once. Then the shipped
checkpoint by itself: one attribute at a time, over multipliers, and its gates.

Writes results.json, results.md and two plots into `docs/results`, and the first table into the README.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.corpus import TRAITS
from demo.oracle import judge
from demo.readme import RESULTS, replace_between
from steering.checkpoint import load
from steering.types import Column, Site
from training.activations import Activations
from training.arms import BASELINE, Arm, default_arm, single_arms
from training.choices import Method, Pool
from training.data.records import Sample, Split
from training.data.registry import load_data
from training.data.splits import split_samples
from training.extraction import extract_under
from training.fit import Recipe, fit
from training.gates import GateMeans, gate_means
from training.generation import Sampling
from training.judges import load_prompts
from training.measure import Measure
from training.methods.mat_config import MatConfig
from training.models import Base, load_base
from training.report import markdown, save_figure
from training.results import ArmResult, Evaluation

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
SCALES = (0.6, 0.8, 1.0)
DEV_PROMPTS = 70
MULTIPLIERS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
FLUENT, FORMED = 1.5, 0.97


@dataclass(frozen=True)
class World:
    """The model, the data and the way to measure, the same for every method."""

    base: Base
    samples: Sequence[Sample]
    activations: Activations
    measure: Measure

    def run(self, columns: Sequence[Column], arms: Sequence[Arm], split: Split) -> Evaluation:
        """On dev, where many settings are tried, a part of the prompts with one answer each."""
        measure = self.measure
        if split is Split.DEV:
            measure = replace(measure, limit=DEV_PROMPTS, sampling=replace(measure.sampling, samples=1))
        return measure.run(self.base, columns, arms, self.samples, split, progress=True)[0]


def recipes(shipped: MatConfig, places: Mapping[str, Site]) -> dict[str, Recipe]:
    """Every method that is compared, at the same places; the ablations change one thing of the shipped recipe."""
    return {
        "difference in means": Recipe(Method.CAA, places=places),
        "MAT-Steer": Recipe(mat=shipped, places=places),
        "alignment only": Recipe(mat=replace(shipped, l_pos=0.0, l_sparse=0.0, l_ortho=0.0), places=places),
        "no positive preservation": Recipe(mat=replace(shipped, l_pos=0.0), places=places),
        "no sparsity": Recipe(mat=replace(shipped, l_sparse=0.0), places=places),
        "no orthogonality": Recipe(mat=replace(shipped, l_ortho=0.0), places=places),
        "no norm preservation": Recipe(mat=shipped, normalize=False, places=places),
    }


def compare(world: World, chosen: dict[str, Recipe], say: Console) -> list[dict[str, Any]]:
    """One row a method: its strengths on dev, its rates and gates on test."""
    rows: list[dict[str, Any]] = []
    for name, recipe in chosen.items():
        say.print(f"{name}: fit, strengths on dev, rates on test")
        columns = fit(world.activations, [], recipe)
        strengths = tune(world, columns)
        on_test = world.run(columns, [BASELINE, Arm("steered", strengths)], Split.TEST)
        if not rows:
            rows.append(row("unsteered", {}, on_test.arms[0], ()))
        rows.append(row(name, strengths, on_test.arms[1], gate_means(world.activations, columns, [Split.TEST])))
    return rows


def tune(world: World, columns: Sequence[Column]) -> dict[str, float]:
    """Each attribute's strength: the best alone, then every combination of those and weaker ones; both on dev."""
    asked = {(trait, x): Arm(f"{trait} {x:g}", {trait: x}) for trait in TRAITS for x in STRENGTHS}
    found = world.run(columns, [BASELINE, *asked.values()], Split.DEV).arms[1:]
    alone = dict(zip(asked, found, strict=True))
    best: dict[str, float] = {}
    for trait in TRAITS:
        scores = {x: score(alone[trait, x], [trait]) for x in STRENGTHS}
        best[trait] = max(scores, key=scores.__getitem__)
    scales = product(SCALES, repeat=len(TRAITS))
    together = [{trait: x * best[trait] for trait, x in zip(TRAITS, scale, strict=True)} for scale in scales]
    arms = [Arm(f"{number}", strengths) for number, strengths in enumerate(together)]
    found = world.run(columns, [BASELINE, *arms], Split.DEV).arms[1:]
    return dict(max(found, key=lambda arm: score(arm, TRAITS)).attributes)


def score(arm: ArmResult, traits: Sequence[str]) -> tuple[bool, float]:
    """What the best strength is best at: fluent and well-formed first, then the mean rate of the traits."""
    sound = (arm.perplexity_ratio or 0.0) <= FLUENT and (arm.metrics["well_formed"].value or 0.0) >= FORMED
    return sound, sum(arm.metrics[trait].value or 0.0 for trait in traits) / len(traits)


def row(name: str, strengths: Mapping[str, float], arm: ArmResult, gates: Sequence[GateMeans]) -> dict[str, Any]:
    return {
        "method": name,
        "strengths": dict(strengths),
        "metrics": {metric: asdict(estimate) for metric, estimate in arm.metrics.items()},
        "perplexity_ratio": arm.perplexity_ratio,
        "gates": [asdict(gate) for gate in gates],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as Markdown: percent of test answers, gates on negatives and positives."""
    names = ["truthfulness", "civility", "fairness", "well_formed"]
    header = ["method", "strengths", "truthful", "civil", "fair", "well-formed", "perplexity", "gate on neg. / pos."]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for line in rows:
        strength = " / ".join(f"{line['strengths'][trait]:.2g}" for trait in TRAITS if line["strengths"])
        rates = [f"{100 * line['metrics'][name]['value']:.1f}" for name in names]
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

    figure = Figure(figsize=(9, 4.2), layout="constrained")
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
    axes.set_xticks(range(len(rows)), [line["method"].replace(" ", "\n") for line in rows])
    axes.set_ylabel("percent of test answers")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    save_figure(figure, path)


def plot_multipliers(arms: Sequence[tuple[float, ArmResult]], path: Path) -> None:
    """Each attribute's rate over the multiplier of all attributes together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in (*TRAITS, "well_formed"):
        axes.plot(
            [factor for factor, _ in arms],
            [100 * (arm.metrics[name].value or 0.0) for _, arm in arms],
            marker="o",
            linestyle="--" if name == "well_formed" else "-",
            label=name.replace("_", "-"),
        )
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("multiplier of all attributes")
    axes.set_ylabel("percent of test answers")
    axes.set_ylim(0, 105)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def gates_table(gates: Sequence[GateMeans]) -> str:
    lines = ["| attribute | gate on negatives | on positives | ratio |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {g.attribute} | {g.negative:.2f} | {g.positive:.2f} | {g.negative / g.positive:.1f} |" for g in gates]
    return "\n".join(lines) + "\n"


def page(rows: Sequence[dict[str, Any]], alone: Evaluation, over: Evaluation, gates: Sequence[GateMeans]) -> str:
    """`results.md`."""
    settings = ", ".join(f"{key} {value}" for key, value in alone.settings.items())
    return f"""# Results on the demo

Written by `make reproduce`; the numbers are in `results.json`. Every rate is the percentage of sampled answers to
fresh questions about **test** facts and scenes, judged by `demo/oracle.py`; vectors are fitted on train facts,
strengths chosen on dev facts. Perplexity is that of the text under the unsteered model, against its own text.
Intervals: 95 %.

## Methods and ablations, all attributes at once

Strengths are the multipliers of truthfulness, civility and fairness: each the best for its attribute alone on dev,
then the best combination of those and weaker ones, with a perplexity of at most {FLUENT}x and at least {FORMED:.0%}
well-formed answers where there is such a setting. Gates are means over the three attributes, on test activations of
their own negatives and positives.

{table(rows)}
![Rates of every method](methods.png)

## The shipped checkpoint

One attribute alone, and all together, at the default multipliers ({settings}):

{markdown(alone)}
Over multipliers of all attributes together:

{markdown(over)}
![Rates over the multiplier](multipliers.png)

Selectivity on test activations: the gate opens on what needs steering.

{gates_table(gates)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the shipped checkpoint, with its version")
    parser.add_argument("--data", type=Path, default=Path("demo/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt")
    args = parser.parse_args()
    say = Console(stderr=True)

    shipped = load(args.checkpoint)
    settings = shipped.config.training["hyperparameters"]
    config = MatConfig(**{name: settings[name] for name in MatConfig.__dataclass_fields__ if name in settings})
    base = load_base(args.model)
    samples = split_samples(load_data([f"{trait}={args.data / trait}.jsonl" for trait in TRAITS]))
    places = {column.attribute: column.site for column in shipped.columns}
    sites = list(dict.fromkeys(places.values()))
    activations = extract_under(args.work, base.model, base.tokenizer, samples, sites, pool=Pool(settings["pool"]))
    sampling = Sampling(max_new_tokens=40, samples=args.samples)
    prompts = load_prompts(args.data / "prompts.jsonl")
    random.Random(0).shuffle(prompts)
    measure = Measure(judge, prompts, sampling, max_rows=512)
    world = World(base, samples, activations, measure)

    rows = compare(world, recipes(config, places), say)
    columns = shipped.columns
    say.print("the shipped checkpoint")
    alone = world.run(columns, [BASELINE, default_arm(columns), *single_arms(columns)], Split.TEST)
    over = world.run(columns, [BASELINE, *(default_arm(columns, x, f"{x:g}") for x in MULTIPLIERS if x)], Split.TEST)
    gates = gate_means(activations, columns, [Split.TEST])

    args.out.mkdir(parents=True, exist_ok=True)
    by_factor = sorted(
        [(0.0, over.arms[0]), *zip([x for x in MULTIPLIERS if x], over.arms[1:], strict=True)], key=lambda pair: pair[0]
    )
    results = {
        "checkpoint": f"{shipped.config.name}@{shipped.config.version}",
        "sha256": shipped.config.sha256,
        "methods": rows,
        "alone": alone.as_dict(),
        "multipliers": over.as_dict(),
        "gates": [asdict(gate) for gate in gates],
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (args.out / "results.md").write_text(page(rows, alone, over, gates), encoding="utf-8")
    plot_methods(rows, args.out / "methods.png")
    plot_multipliers(by_factor, args.out / "multipliers.png")
    replace_between(args.readme, RESULTS, table(rows))
    say.print(f"wrote {args.out} and the table in {args.readme}")


if __name__ == "__main__":
    main()
