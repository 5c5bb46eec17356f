"""The comparison of the paper's tables, on the demo: `make reproduce`.

The unsteered model, the shipped checkpoint at its default multipliers, difference in means, MAT-Steer and its
ablations (arXiv 2502.12446), fitted on train, at the strengths that are best on dev, measured on test with all
attributes at once. The objectives, on dev. Then the shipped checkpoint by itself: one attribute at a time, over
multipliers, and its gates.

Writes results.json, results.md and its plots into `docs/results`, and the first table into the README
(`demo/results.py`).
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from demo.corpus import TRAITS
from demo.oracle import judge
from demo.results import write
from steering.checkpoint import Checkpoint, load
from steering.types import Column, Site
from training.activations import Pool
from training.activations.extraction import extract_under
from training.activations.store import Activations
from training.data.samples import Form, Sample, Split
from training.data.sources import load_data
from training.data.splits import split_samples
from training.evaluation.evaluator import Evaluator, GateMeans, gate_means
from training.evaluation.generation import Sampling
from training.evaluation.judged import load_prompts
from training.evaluation.results import BASELINE, Arm, ArmResult, Evaluation, default_arm, single_arms
from training.evaluation.sweep import best_alone, combine
from training.evaluation.sweep_results import Goal
from training.methods.caa import CaaConfig
from training.methods.fit import Recipe, fit
from training.methods.mat import PAPER, MatConfig, Objective
from training.models import Base, load_base

STRENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0)
DEV_PROMPTS = 120
MULTIPLIERS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
# The oracle says what is well formed; the neutral text has words that this model never saw.
GOAL = Goal(
    metrics=TRAITS, max_perplexity_ratio=1.5, max_repetition=1, max_empty=1, max_kl=inf, keep={"well_formed": 0.97},
    tolerance=0.02,
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The model, the data and the way to measure, the same for every method."""

    base: Base
    samples: Sequence[Sample]
    activations: Activations
    evaluator: Evaluator
    unsteered: dict[Split, ArmResult] = field(default_factory=dict)

    def steered(self, columns: Sequence[Column], arms: Sequence[Arm], split: Split) -> list[ArmResult]:
        """The arms' results beside unsteered text, which is generated once for all methods."""
        if split not in self.unsteered:
            self.unsteered[split] = self.run(columns, [BASELINE], split).arms[0]
        plain = self.unsteered[split].perplexity or 1.0
        found = self.run(columns, arms, split).arms
        return [replace(arm, perplexity_ratio=(arm.perplexity or 0.0) / plain, perplexity_range=None) for arm in found]

    def run(self, columns: Sequence[Column], arms: Sequence[Arm], split: Split) -> Evaluation:
        """On dev, where many settings are tried, a part of the prompts with one answer each."""
        evaluator = self.evaluator
        if split is Split.DEV:
            evaluator = replace(evaluator, limit=DEV_PROMPTS, sampling=replace(evaluator.sampling, samples=1))
        return evaluator.evaluate(self.base, columns, arms, self.samples, split, progress=True)[0]


def recipes(shipped: MatConfig, places: Mapping[str, tuple[Site, ...]]) -> dict[str, Recipe]:
    """Every method that is compared; the ablations change one thing of the shipped recipe. Vectors can only be
    orthogonal to others at their own site, so orthogonality is also left out where all attributes share one."""
    shared = dict.fromkeys(places, places["truthfulness"])
    return {
        "difference in means": Recipe(CaaConfig(), places=places),
        "MAT-Steer": Recipe(shipped, places=places),
        "alignment only": Recipe(replace(shipped, l_pos=0.0, l_sparse=0.0, l_ortho=0.0), places=places),
        "no positive preservation": Recipe(replace(shipped, l_pos=0.0), places=places),
        "no sparsity": Recipe(replace(shipped, l_sparse=0.0), places=places),
        "no orthogonality": Recipe(replace(shipped, l_ortho=0.0), places=places),
        "no norm preservation": Recipe(shipped, normalize=False, places=places),
        "one place for all": Recipe(shipped, places=shared),
        "one place for all, no orthogonality": Recipe(replace(shipped, l_ortho=0.0), places=shared),
    }


def objectives(shipped: MatConfig, places: Mapping[str, tuple[Site, ...]]) -> dict[str, Recipe]:
    """The three ways to reduce the losses, all else equal, and the paper's settings as they are published."""
    same = {f"{one.value}": Recipe(replace(shipped, objective=one), places=places) for one in Objective}
    return {**same, "paper, with its own settings": Recipe(PAPER, places=places)}


def reference_rows(world: World, shipped: Checkpoint) -> list[dict[str, Any]]:
    """What every method is compared with: no steering, and the shipped checkpoint at its defaults, on test."""
    columns = shipped.columns
    found = world.run(columns, [BASELINE, default_arm(columns)], Split.TEST).arms
    gates = gate_means(world.activations, columns, [Split.TEST])
    return [row("unsteered", {}, found[0], ()), row("the shipped checkpoint", found[1].attributes, found[1], gates)]


def compare(world: World, chosen: dict[str, Recipe], split: Split, say: Console) -> Iterator[dict[str, Any]]:
    """One row a method: its strengths from dev, its rates and gates on `split`."""
    for name, recipe in chosen.items():
        say.print(f"{name}: fit, strengths on dev, rates on {split.value}")
        columns = fit(world.activations, [], recipe)
        strengths = tune(world, columns)
        (steered,) = world.steered(columns, [Arm("steered", strengths)], split)
        yield row(name, strengths, steered, gate_means(world.activations, columns, [split]))


def tune(world: World, columns: Sequence[Column]) -> dict[str, float]:
    """Each attribute's strength: the best alone, then the best beside the others; both on dev."""

    def run(arms: Sequence[Arm]) -> Sequence[ArmResult]:
        return world.steered(columns, arms, Split.DEV)

    return combine(run, best_alone(run, TRAITS, STRENGTHS, GOAL), GOAL, rounds=1)


def row(name: str, strengths: Mapping[str, float], arm: ArmResult, gates: Sequence[GateMeans]) -> dict[str, Any]:
    return {
        "method": name,
        "strengths": dict(strengths),
        "metrics": {metric: asdict(estimate) for metric, estimate in arm.metrics.items()},
        "perplexity_ratio": arm.perplexity_ratio,
        "gates": [asdict(gate) for gate in gates],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the shipped checkpoint, with its version")
    parser.add_argument("--data", type=Path, default=Path("demo/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt")
    args = parser.parse_args()
    say = Console(stderr=True)

    shipped = load(args.checkpoint)
    settings = shipped.config.training["hyperparameters"]
    config = MatConfig(**{name: settings[name] for name in MatConfig.__dataclass_fields__ if name in settings})
    base = load_base(args.model)
    samples = split_samples(load_data([f"{trait}={args.data / trait}.jsonl" for trait in TRAITS]))
    places = {trait: tuple(column.site for column in shipped.columns if column.attribute == trait) for trait in TRAITS}
    sites = list(dict.fromkeys(column.site for column in shipped.columns))
    activations = extract_under(args.work, base.model, base.tokenizer, samples, sites, pool=Pool(settings["pool"]))
    sampling = Sampling(max_new_tokens=40, samples=args.samples)
    prompts = load_prompts(args.data / "prompts.jsonl")
    evaluator = Evaluator(judge, prompts, sampling, max_rows=512, form=Form.PLAIN)
    world = World(base, samples, activations, evaluator)

    rows = [*reference_rows(world, shipped), *compare(world, recipes(config, places), Split.TEST, say)]
    on_dev = list(compare(world, objectives(config, places), Split.DEV, say))
    columns = shipped.columns
    say.print("the shipped checkpoint")
    alone = world.run(columns, [BASELINE, default_arm(columns), *single_arms(columns)], Split.TEST)
    over = world.run(columns, [BASELINE, *(default_arm(columns, x, f"{x:g}") for x in MULTIPLIERS if x)], Split.TEST)
    gates = gate_means(activations, columns, [Split.TEST])

    results = {
        "checkpoint": f"{shipped.config.name}@{shipped.config.version}",
        "sha256": shipped.config.sha256,
        "methods": rows,
        "objectives": on_dev,
        "alone": alone.as_dict(),
        "multipliers": over.as_dict(),
        "gates": [asdict(gate) for gate in gates],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(args.out, args.readme)
    say.print(f"wrote {args.out} and the table in {args.readme}")


if __name__ == "__main__":
    main()
