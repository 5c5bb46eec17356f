"""The comparison of the paper's tables, on the demo: `make reproduce`.

The unsteered model, the shipped checkpoint at its default multipliers, difference in means, MAT-Steer and its
ablations (arXiv 2502.12446), fitted on train, at the strengths that are best on dev, measured on test with all
attributes at once. The objectives, on dev. Then the shipped checkpoint by itself: one attribute at a time, over
multipliers, and its gates.

Writes results.json, results.md and its plots into `docs/results`, and the first table into the README
(`demo/results.py`); the answers, judged, stay in `runs/reproduce/answers`, a file of JSON lines for each table.
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
from demo.results import side_by_side, write
from steering.checkpoint import Checkpoint, load
from steering.column import Column
from steering.types import Site
from training.activations import Pool
from training.activations.extraction import extract_under
from training.activations.store import Activations
from training.data.samples import Split
from training.data.sources import load_data
from training.data.splits import split_samples
from training.evaluation.evaluator import GateMeans, gate_means
from training.evaluation.generation import Sampling
from training.evaluation.judged import Prompt, evaluate_generations, load_prompts, prompts_of
from training.evaluation.report import store_rows
from training.evaluation.results import (
    BASELINE,
    Arm,
    ArmMeasures,
    ArmResult,
    Evaluation,
    compared,
    default_arm,
    single_arms,
)
from training.evaluation.sweep import best_alone, combine
from training.evaluation.sweep_results import Goal
from training.methods.caa import CaaConfig
from training.methods.fit import Recipe, fit
from training.methods.mat import PAPER, MatConfig, Objective
from training.models import Base, load_base

MAX_ROWS = 512
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
    activations: Activations
    prompts: Sequence[Prompt]
    sampling: Sampling
    answers: Path
    """Where judged answers are written to."""
    unsteered: dict[Split, ArmMeasures] = field(default_factory=dict)

    def beside(
        self, columns: Sequence[Column], arms: Sequence[Arm], split: Split, keep: str | None = None
    ) -> Evaluation:
        """The unsteered model and the arms; unsteered text is generated once for all methods. On dev, where many
        settings are tried, of a part of the prompts with one answer each. `keep`: the name of the answers' file."""
        dev, before = split is Split.DEV, self.unsteered.get(split)
        evaluation, texts = evaluate_generations(
            self.base.model,
            self.base.tokenizer,
            prompts_of(self.prompts, split, DEV_PROMPTS if dev else None),
            judge,
            columns,
            arms if before else [BASELINE, *arms],
            replace(self.sampling, samples=1) if dev else self.sampling,
            max_rows=MAX_ROWS,
            progress=True,
            before=before,
        )
        self.unsteered.setdefault(split, evaluation.measures[0])
        if keep is not None:
            store_rows(evaluation, texts, self.answers / f"{keep}.jsonl")
        return evaluation


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


def measure_shipped(world: World, shipped: Checkpoint) -> Evaluation:
    """On test at its defaults, each attribute alone, and over multipliers: arms named `steered`, as `single_arms` names
    them, and after the multiplier."""
    columns = shipped.columns
    others = [default_arm(columns, x, f"{x:g}") for x in MULTIPLIERS if x not in (0, 1)]
    return world.beside(columns, [default_arm(columns), *single_arms(columns), *others], Split.TEST, "shipped")


def alone_and_over(found: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Of `measure_shipped`: the defaults and single attributes; all multipliers, in their order."""
    unsteered, steered, *others = found.arms
    single = [arm for arm in others if arm.arm.endswith(" alone")]
    scaled = [replace(steered, arm="1"), *(arm for arm in others if arm not in single)]
    over = sorted(scaled, key=lambda arm: float(arm.arm))
    return side_by_side([unsteered, steered, *single], found.settings), side_by_side([unsteered, *over], found.settings)


def compare(
    world: World, chosen: dict[str, Recipe], split: Split, say: Console, known: Mapping[str, Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """One row a method: its strengths, `known` or from dev, its rates, damage and gates on `split`."""
    for name, recipe in chosen.items():
        say.print(f"{name}: fit, strengths on dev, rates on {split.value}")
        columns = fit(world.activations, [], recipe)
        strengths = known.get(name) or tune(world, columns)
        keep = f"{split.value}-{name.replace(' ', '-').replace(',', '')}"
        steered = world.beside(columns, [Arm("steered", strengths)], split, keep).arms[1]
        yield row(name, strengths, steered, gate_means(world.activations, columns, [split]))


def tune(world: World, columns: Sequence[Column]) -> dict[str, float]:
    """Each attribute's strength: the best alone, then the best beside the others; both on dev."""

    def run(arms: Sequence[Arm]) -> Sequence[ArmResult]:
        return world.beside(columns, arms, Split.DEV).arms[1:]

    return combine(run, best_alone(run, TRAITS, STRENGTHS, GOAL), GOAL, rounds=1)


def known_strengths(path: Path | None, shipped: Checkpoint) -> dict[str, Mapping[str, float]]:
    """Method -> strengths of an earlier results.json of this checkpoint."""
    if path is None:
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["sha256"] != shipped.config.sha256:
        raise SystemExit(
            f"--strengths {path}: it is of another checkpoint than --checkpoint; leave it out to look anew"
        )
    return {line["method"]: line["strengths"] for line in (*earlier["methods"], *earlier["objectives"])}


def row(name: str, strengths: Mapping[str, float], arm: ArmResult, gates: Sequence[GateMeans]) -> dict[str, Any]:
    return {
        "method": name,
        "strengths": dict(strengths),
        "result": asdict(arm),
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
    parser.add_argument(
        "--strengths",
        type=Path,
        help="an earlier results.json of this checkpoint: its strengths are not looked for anew",
    )
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
    world = World(base, activations, prompts, sampling, args.work / "answers")

    known = known_strengths(args.strengths, shipped)
    say.print("the shipped checkpoint")
    alone, over = alone_and_over(measure_shipped(world, shipped))
    gates = gate_means(activations, shipped.columns, [Split.TEST])
    unsteered, steered = alone.arms[:2]
    rows = [
        row(BASELINE.name, {}, unsteered, ()),
        row("the shipped checkpoint", steered.attributes, steered, gates),
        *compare(world, recipes(config, places), Split.TEST, say, known),
    ]
    on_dev = list(compare(world, objectives(config, places), Split.DEV, say, known))
    on_dev.insert(0, row(BASELINE.name, {}, compared([world.unsteered[Split.DEV]])[0], ()))

    results = {
        "checkpoint": f"{shipped.config.name}@{shipped.config.version}",
        "sha256": shipped.config.sha256,
        "earlier_strengths": bool(known),
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
