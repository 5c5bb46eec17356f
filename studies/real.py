"""MAT-Steer beside simpler methods and its own ablations on a real model: `make reproduce-real`.

TruthfulQA, ToxiGen and BBQ, split 40/10/50 by question (ToxiGen: by text). Activations are extracted once a pooling;
places and strengths are chosen on dev; test is read once, all methods beside each other on the same questions. Every
stage leaves its result in the work folder: an interrupted run goes on from there.

Writes real.json, real.md and two plots into `docs/results`, and a table into the README (`studies/real_results.py`).
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from steering.known_models import KNOWN
from steering.types import Site
from studies.real_results import (
    ALIGNMENT,
    IN_CONTEXT,
    ITI,
    MAT,
    MEANS,
    MEANS_THERE,
    METRICS,
    NO_NORM,
    NO_ORTHO,
    PROBE,
    SETS,
    SIMPLER,
    pairs,
    write,
)
from studies.study import GOAL, Sizes, Study, Variant, line, measured
from training.activations import Pool
from training.data.samples import Sample, Split, Task
from training.data.sources import DataSpec, load_data
from training.data.splits import split_samples
from training.evaluation.results import ArmResult
from training.evaluation.tasks import Question
from training.files import write_bytes
from training.methods.caa import CaaConfig
from training.methods.fit import Recipe
from training.methods.iti import ItiConfig
from training.methods.mat import MatConfig
from training.methods.probe import ProbeConfig
from training.models import load_base
from training.pipeline import libraries

HUB = {
    "truthfulqa": "hub:truthfulqa/truthful_qa",
    "toxigen": "hub:toxigen/toxigen-data",
    "bbq": "hub:oskarvanderwal/bbq/All",
}
FILES = {"truthfulqa": "truthfulqa/mc_task.json", "toxigen": "toxigen/*.csv", "bbq": "bbq/*.jsonl"}
"""In a folder of data."""
SHARES = (0.1, 0.25, 0.5)
TOKENS_A_TEXT = 10  # about
DEMONSTRATIONS = 4


# What is compared.


def ablations(config: MatConfig, site: Site) -> dict[str, Variant]:
    """MAT-Steer without one of its parts."""
    recipes = {
        NO_NORM: Recipe(config, normalize=False),
        "no positive preservation": Recipe(replace(config, l_pos=0.0)),
        "no sparsity": Recipe(replace(config, l_sparse=0.0)),
        NO_ORTHO: Recipe(replace(config, l_ortho=0.0)),
        ALIGNMENT: Recipe(replace(config, l_pos=0.0, l_sparse=0.0, l_ortho=0.0)),
    }
    return {name: Variant(recipe, site) for name, recipe in recipes.items()}


def methods(config: MatConfig, site: Site, simple: Site) -> dict[str, Variant]:
    """Those with a strength of their own: MAT-Steer at `site`, directions at `simple`."""
    return {
        ITI: Variant(Recipe(ItiConfig()), None, (1.0, 5.0, 15.0), Pool.LAST),
        MEANS: Variant(Recipe(CaaConfig()), simple, (0.5, 1.0, 2.0)),
        PROBE: Variant(Recipe(ProbeConfig()), simple, (1.0, 2.0, 4.0)),
        MAT: Variant(Recipe(config), site, (1.0, 2.0, 4.0)),
    }


def try_out(study: Study, stage: str, variants: Mapping[str, Sequence[Variant]]) -> list[dict[str, Any]]:
    """Every variant at its multipliers on dev: a row each."""
    tried = [
        (name, variant, multiplier)
        for name, own in variants.items()
        for variant in own
        for multiplier in variant.multipliers
    ]
    content = [[name, variant.settings(), multiplier] for name, variant, multiplier in tried]
    found = study.measure(
        stage,
        content,
        study.asked(Split.DEV, study.sizes.dev),
        lambda: [
            study.steered(f"{name}, {one.place} x{multiplier:g}", one, multiplier) for name, one, multiplier in tried
        ],
        study.sizes.answers,
    )
    measures = measured(found)  # of all questions: an arm's own result is of the first part of them
    results = (
        replace(
            ArmResult.from_dict(arm["result"]),
            metrics={title: one.estimate() for title, one in measures[arm["name"]].items()},
        )
        for arm in found["arms"][1:]
    )
    return [
        {"method": name, "place": variant.place, "multiplier": multiplier, **on_dev(arm)}
        for (name, variant, multiplier), arm in zip(tried, results, strict=True)
    ]


def best_of(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The best of a method's rows that do not break the text, the weakest of those that are as good."""
    own = [row for row in rows if row["method"] == name]
    ranks = [(-row["shortfall"], row["score"]) for row in own]
    return own[GOAL.best(ranks, [row["multiplier"] for row in own])]


def further(rows: Sequence[dict[str, Any]], variants: Mapping[str, Variant]) -> dict[str, list[Variant]]:
    """Of those whose best multiplier is the largest that was tried, larger ones; of those that all break the text,
    smaller ones."""
    found = {}
    for name, variant in variants.items():
        best = best_of(rows, name)
        if best["shortfall"] > 0:
            found[name] = tuple(factor * min(variant.multipliers) for factor in (0.1, 0.2, 0.4))
        elif best["multiplier"] == max(variant.multipliers):
            found[name] = tuple(factor * best["multiplier"] for factor in (2.0, 4.0))
    return {name: [replace(variants[name], multipliers=more)] for name, more in found.items()}


def on_dev(arm: ArmResult) -> dict[str, Any]:
    """What a choice rests on."""
    return {
        "score": GOAL.score(arm),
        "shortfall": GOAL.shortfall(arm),
        "metrics": {name: arm.metrics[name].value for name in METRICS if name in arm.metrics},
        "perplexity_ratio": arm.perplexity_ratio,
        "damage": {name: one.value for name, one in arm.damage.items()},
    }


# What is measured on test.


def in_context(asked: Sequence[Question], shown: Sequence[Question], count: int = DEMONSTRATIONS) -> list[Question]:
    """The questions after `count` others of their attribute with the right answers, these as different as may be."""
    found = []
    prefixes: dict[str, str] = {}
    for question in asked:
        if question.attribute not in prefixes:
            own = [one for one in shown if one.attribute == question.attribute]
            prefixes[question.attribute] = "".join(
                f"{one.prompt}{answer}\n\n" for one, answer in islice(_in_turn(own), count)
            )
        found.append(replace(question, prompt=prefixes[question.attribute] + question.prompt))
    return found


def _in_turn(shown: Sequence[Question]) -> Iterator[tuple[Question, str]]:
    """Questions with their right answers, the places of these in turn, so that none of them is the one to repeat."""
    by_place: dict[int, list[tuple[Question, str]]] = {}
    for one in shown:
        free = one.task is Task.TRUTHFULQA  # whose answers have no fixed places
        place = one.item.best[0] if free and one.item and one.item.best else one.labels.index(True)
        by_place.setdefault(0 if free else place, []).append((one, one.completions[place]))
    for found in zip_longest(*(by_place[place] for place in sorted(by_place))):
        yield from (one for one in found if one is not None)


def constant(asked: Sequence[Question]) -> dict[str, float]:
    """What a model would score that says the same to every question: of ToxiGen's two answers the commoner one, to BBQ
    that nothing is known."""
    found = {}
    for name in dict.fromkeys(question.attribute for question in asked):
        own = [question for question in asked if question.attribute == name]
        if own[0].task is Task.TOXIGEN:
            found[f"{name} accuracy"] = max(sum(one.labels[place] for one in own) for place in (0, 1)) / len(own)
        elif own[0].task is Task.BBQ:
            items = [one.item for one in own if one.item is not None]
            right = sum(item.unknown is not None and item.labels[item.unknown] for item in items)
            found[f"{name} accuracy"] = right / len(own)
    return found


Arms = Mapping[str, tuple[str, Variant]]
"""Title -> the method whose multiplier it takes, and the variant."""


def run(study: Study, config: MatConfig) -> Iterator[dict[str, Any]]:
    """The results in JSON's types, as far as they are, after each stage on test and at the end."""
    sizes = study.sizes
    everywhere = [methods(config, site, site) for site in study.candidates]
    tried = try_out(
        study,
        "places",
        {ITI: [everywhere[0][ITI]]} | {name: [each[name] for each in everywhere] for name in (MEANS, MAT)},
    )
    place, simple = (Site.parse(best_of(tried, name)["place"]) for name in (MAT, MEANS))
    chosen = methods(config, place, simple)
    more = further(tried, {name: chosen[name] for name in (ITI, MEANS, MAT)})
    tried += try_out(study, "strengths", {PROBE: [chosen[PROBE]]} | more)
    if more := further(tried, {PROBE: chosen[PROBE]}):
        tried += try_out(study, "strengths-further", more)
    best = {name: best_of(tried, name) for name in chosen}
    parts_of_mat = ablations(config, place)
    there = {MEANS_THERE: methods(config, place, place)[MEANS]}
    variants = chosen | parts_of_mat | there
    multipliers = {name: best[name if name in best else MAT]["multiplier"] for name in variants}

    def measured_arms(stage: str, asked: Sequence[Question], chosen: Arms, answers: int) -> dict[str, Any]:
        content = [[title, variant.settings(), multipliers[name]] for title, (name, variant) in chosen.items()]
        return study.measure(
            stage,
            content,
            asked,
            lambda: [study.steered(title, variant, multipliers[name]) for title, (name, variant) in chosen.items()],
            answers,
        )

    both = (MAT, MEANS)
    pools = {
        f"{name}, {pool}": (name, pooled(variants[name], pool))
        for name in both
        for pool in (Pool.MEAN, Pool.LAST, Pool.TOKENS)
    }
    alone = {
        f"{name}, {attribute} alone": (name, replace(variants[name], only=attribute))
        for name in (*chosen, *parts_of_mat)
        if name != NO_ORTHO  # of one attribute there is none
        for attribute in study.names
    }
    shares = {f"{name}, {share:.0%}": (name, replace(variants[name], share=share)) for name in both for share in SHARES}
    asked, on_dev_questions = study.tested(), study.asked(Split.DEV, sizes.dev)
    part = range(len(replace(study, sizes=replace(sizes, test=min(sizes.part, sizes.test))).tested()))
    answers = sizes.test_answers
    test = measured_arms("test", asked, {name: (name, variants[name]) for name in (MAT, *parts_of_mat)}, answers)
    simpler = {name: (name, variants[name]) for name in SIMPLER if name in variants}
    others = measured_arms("test-others", asked, simpler, answers)
    shown = study.asked(Split.TRAIN, 8 * DEMONSTRATIONS)
    prompted = study.measure("in-context", [], in_context(asked, shown), list, answers)
    test["arms"][1:1] = [{**prompted["arms"][0], "name": IN_CONTEXT}, *others["arms"][1:]]
    whole = measured(test)
    at = {name: {"place": variants[name].place, "multiplier": multipliers[name]} for name in variants}
    names = [arm["name"] for arm in test["arms"]]
    untrained = study.untrained({name: variants[name] for name in (MAT, *parts_of_mat)})
    results = {
        "questions": counted(asked),
        "part": counted([asked[place] for place in part]),
        "dev": counted(on_dev_questions),
        "sizes": asdict(sizes),
        "fitted": fitted_counts(study.texts),
        "constant": constant(asked),
        "demonstrations": DEMONSTRATIONS,
        "methods": [line(name, test, whole, **at.get(name, {})) for name in names],
        "pairs": {
            f"{one} - {other}": {title: asdict(whole[one][title].minus(whole[other][title])) for title in SETS}
            for one, other in pairs(names)
        },
        "tried": tried,
        "best": best,
        "notes": sorted(set(test["notes"])),
        "untrained": untrained,
    }
    yield results

    full, both_arms = measured(test, part), [arm for arm in test["arms"] if arm["name"] in both]
    for stage, arms in (("alone", alone), ("shares", shares)):
        found = measured_arms(stage, [asked[place] for place in part], arms, answers)
        found["arms"] += both_arms
        measures = measured(found) | {name: full[name] for name in both}
        whose = {name: {"of": of, "share": one.share} for name, (of, one) in arms.items()}
        whose |= {name: {"of": name, "share": 1.0} for name in both}
        results[stage] = [line(name, found, measures, **whose[name]) for name in (*arms, *both)]
        untrained |= study.untrained({name: one for name, (_, one) in arms.items()})
        yield results
    found = measured_arms("pools", on_dev_questions, pools, sizes.answers)
    results["pools"] = [line(name, found, measured(found)) for name in pools]
    untrained |= study.untrained({name: one for name, (_, one) in pools.items()})
    yield results


def pooled(variant: Variant, pool: Pool) -> Variant:
    """Tokens are many more rows: as many steps on them as on means are fewer epochs."""
    config = variant.recipe.config
    if pool is Pool.TOKENS and isinstance(config, MatConfig):
        config = replace(config, epochs=max(1, config.epochs // TOKENS_A_TEXT))
    return replace(variant, pool=pool, recipe=replace(variant.recipe, config=config))


def counted(asked: Sequence[Question]) -> dict[str, dict[str, int]]:
    """Attribute -> how many questions, and clusters of them."""
    found: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(question.attribute for question in asked):
        own = [question.cluster for question in asked if question.attribute == name]
        found[name] = {"questions": len(own), "clusters": len(set(own))}
    return found


def fitted_counts(texts: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Attribute -> texts of train on either side, and the groups that they are of."""
    found: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys(text.attribute for text in texts):
        own = [text for text in texts if text.attribute == name and text.split is Split.TRAIN]
        found[name] = {
            "positive": sum(text.label for text in own),
            "negative": sum(not text.label for text in own),
            "groups": len({text.group for text in own}),
        }
    return found


def compact(results: Mapping[str, Any]) -> str:
    """JSON with five digits, and a line for each thing that was measured."""
    short = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 5))
    parts = []
    for name, value in short.items():
        lines = ",\n".join(f" {json.dumps(one)}" for one in value) if isinstance(value, list) else ""
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]" if lines else f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def sources(folder: Path | None) -> list[str]:
    """What `--data` takes."""
    return [f"{name}={folder / FILES[name] if folder else HUB[name]}" for name in HUB]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--data", type=Path, help=f"a folder with {', '.join(FILES.values())}; without it from the Hugging Face hub"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce-real"))
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    for one in fields(Sizes):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=int, default=one.default)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console, begun = Console(stderr=True), time.perf_counter()
    sizes = Sizes(**{one.name: getattr(args, one.name) for one in fields(Sizes)})
    specs = sources(args.data)
    samples = split_samples(load_data(specs))
    base = load_base(args.model)
    study = Study(
        base, samples, sizes, args.work, lambda text: console.print(f"{time.perf_counter() - begun:.0f} s: {text}")
    )
    described = [DataSpec.parse(spec).describe() for spec in specs]
    origin = {
        "model": KNOWN[args.model].title if args.model in KNOWN else args.model,
        "data": [{key: one[key] for key in ("loader", "sha256", "files") if key in one} for one in described],
        "libraries": libraries(),
    }
    for results in run(study, MatConfig(epochs=sizes.epochs)):
        write_bytes(args.out / "real.json", compact({**origin, **results}).encode())
        write(args.out, args.readme)
        study.say(f"wrote {args.out}/real.md and the table in {args.readme}")


if __name__ == "__main__":
    main()
