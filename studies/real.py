"""MAT-Steer beside simpler methods and its own ablations on a real model: `make reproduce-real`.

TruthfulQA, ToxiGen and BBQ, split 40/10/50 by question (ToxiGen: by text). Activations are extracted once a pooling;
places and strengths are chosen on dev; test is read once, all methods beside each other on the same questions. Every
stage leaves its result in the work folder: an interrupted run goes on from there.

Writes real.json, real.md and two plots into `docs/results`, and a table into the README (`studies/real_results.py`).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from itertools import islice, zip_longest
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from rich.console import Console

from steering.known_models import KNOWN
from steering.types import Column, Site, SiteKind
from studies.real_results import (
    ALIGNMENT,
    IN_CONTEXT,
    ITI,
    MAT,
    MEANS,
    METRICS,
    NO_NORM,
    PROBE,
    SETS,
    UNSTEERED,
    pairs,
    write,
)
from training.activations import Pool
from training.activations.extraction import extract_under
from training.activations.store import Activations, model_hash, samples_hash
from training.data.samples import Sample, Split, Task
from training.data.sources import DataSpec, draw, load_data
from training.data.splits import split_samples
from training.evaluation.choices import evaluate_choices
from training.evaluation.evaluator import drawn
from training.evaluation.results import BASELINE, Arm, ArmResult, Evaluation, Measured
from training.evaluation.search import Candidates
from training.evaluation.sweep_results import Goal
from training.evaluation.tasks import METRICS as TASK_METRICS
from training.evaluation.tasks import Prompting, Question, questions
from training.files import content_key, write_bytes, write_json
from training.methods.caa import CaaConfig
from training.methods.fit import Recipe, fit
from training.methods.iti import ItiConfig
from training.methods.mat import MatConfig
from training.methods.probe import ProbeConfig
from training.models import Base, load_base
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
PART = 80  # questions that are measured at once
GOAL = Goal(tolerance=0.005, max_empty=0.2)  # of few answers one is more than the usual tenth


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used; questions and texts are drawn by a fixed seed."""

    fit: int = 300
    """Texts of each side of an attribute that vectors are fitted on."""
    dev: int = 16
    """Questions of TruthfulQA that places and strengths are chosen on; of each of the others twice as many."""
    test: int = 128
    """The same, for the comparison on test."""
    part: int = 40
    """The same, the first of these, for what is beside it: attributes alone, and shares of the data."""
    answers: int = 8
    """Questions that are answered in every arm, to see what steering breaks."""
    epochs: int = 100


@dataclass(frozen=True)
class Variant:
    """A way to make vectors, and the multipliers that are tried on dev."""

    recipe: Recipe
    site: Site | None
    """None: all heads."""
    multipliers: tuple[float, ...] = ()
    pool: Pool = Pool.MEAN
    share: float = 1.0
    """Of the groups of train."""
    only: str | None = None
    """Fitted on this attribute by itself."""

    @property
    def place(self) -> str:
        return str(self.site or "heads")

    def settings(self) -> dict[str, Any]:
        return {
            **self.recipe.settings(), "site": self.place, "pool": self.pool.value, "share": self.share,
            "only": self.only,
        }  # fmt: skip


@dataclass(frozen=True)
class Steered:
    """A fitted variant at one multiplier, under a name of its own."""

    name: str
    columns: tuple[Column, ...]
    multiplier: float

    @property
    def arm(self) -> Arm:
        return Arm(self.name, {column.attribute: self.multiplier for column in self.columns})


@dataclass(frozen=True)
class Study:
    """The model, the data and the way to measure, the same for every method."""

    base: Base
    samples: Sequence[Sample]
    sizes: Sizes
    work: Path
    say: Callable[[str], None] = lambda _: None
    extracted: dict[tuple[Pool, tuple[Site, ...]], Activations] = field(default_factory=dict)
    fitted: dict[str, tuple[Column, ...]] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.attribute for sample in self.samples))

    @cached_property
    def texts(self) -> list[Sample]:
        """What vectors are fitted on, and what MAT-Steer chooses its epoch by."""
        sides = {Split.TRAIN: self.sizes.fit, Split.DEV: max(1, self.sizes.fit // 5)}
        return [one for split, count in sides.items() for one in draw(self._of(split), count)]

    @cached_property
    def heads(self) -> tuple[Site, ...]:
        layers: int = self.base.model.config.num_hidden_layers
        return tuple(Site(number, SiteKind.ATTN_HEADS) for number in range(layers))

    @cached_property
    def candidates(self) -> tuple[Site, ...]:
        """Places that are tried: the residual stream from 20 to 50 % of the depth, and the paper's site there."""
        stream = Candidates(kinds=(SiteKind.RESIDUAL,)).sites(self.base.model)[:3]
        return (*stream, Site(stream[-1].layer, SiteKind.ATTN_OUTPUT))

    def _of(self, split: Split) -> list[Sample]:
        return [sample for sample in self.samples if sample.split is split]

    def asked(self, split: Split, count: int) -> list[Question]:
        """So many questions of TruthfulQA, which have seven answers on average, and twice as many of the others."""
        found = []
        for name in self.names:
            own = questions([one for one in self._of(split) if one.attribute == name], Prompting.PLAIN)
            found += drawn(own, count if own[0].task is Task.TRUTHFULQA else 2 * count)
        return found

    def tested(self) -> list[Question]:
        """The questions of test in an order that begins with the same ones however many they are: one of TruthfulQA,
        then two of each other attribute."""
        turns: list[list[Question]] = [[] for _ in range(self.sizes.test)]
        for name in self.names:
            own = questions([one for one in self._of(Split.TEST) if one.attribute == name], Prompting.PLAIN)
            Random(0).shuffle(own)
            each = 1 if own[0].task is Task.TRUTHFULQA else 2
            for place, question in enumerate(own[: each * self.sizes.test]):
                turns[place // each].append(question)
        return [question for turn in turns for question in turn]

    def activations(self, pool: Pool, sites: tuple[Site, ...]) -> Activations:
        """Extracted once."""
        if (pool, sites) not in self.extracted:
            self.extracted[pool, sites] = extract_under(
                self.work,
                self.base.model,
                self.base.tokenizer,
                self.texts,
                sites,
                pool=pool,
                max_rows=32,
                progress=True,
            )
        return self.extracted[pool, sites]

    def columns(self, variant: Variant) -> tuple[Column, ...]:
        """Fitted once."""
        key = content_key([variant.settings(), self.identity])
        if key not in self.fitted:
            sites = self.heads if variant.site is None else (variant.site,)
            # One extraction for all that take means of texts; tokens are many, and kept at one place.
            extracted = self.candidates if variant.pool is Pool.MEAN else sites
            activations = part_of(self.activations(variant.pool, extracted), share=variant.share, only=variant.only)
            self.fitted[key] = fit(activations, sites, variant.recipe, folder=self.work / f"fit-{key}")
        return self.fitted[key]

    def steered(self, name: str, variant: Variant, multiplier: float) -> Steered:
        columns = (replace(one, attribute=f"{name}: {one.attribute}") for one in self.columns(variant))
        return Steered(name, tuple(columns), multiplier)

    def untrained(self, variants: Mapping[str, Variant]) -> list[str]:
        """Those of MAT-Steer of which no epoch was better on dev than the start: gates that look at nothing."""
        return [
            name
            for name, variant in variants.items()
            if isinstance(variant.recipe.config, MatConfig) and self._is_untrained(variant)
        ]

    def _is_untrained(self, variant: Variant) -> bool:
        path = self.work / f"untrained-{content_key([variant.settings(), self.identity])}.json"
        if not path.exists():
            path.write_text(json.dumps(not any(bool(one.gate_weight.any()) for one in self.columns(variant))))
        found: bool = json.loads(path.read_text(encoding="utf-8"))
        return found

    @cached_property
    def identity(self) -> list[str]:
        """What decides every fit beside the method."""
        return [model_hash(self.base.model), samples_hash(self.texts)]

    def measure(
        self, stage: str, content: Any, asked: Sequence[Question], arms: Callable[[], Sequence[Steered]]
    ) -> dict[str, Any]:
        """Unsteered and every arm on the same questions, as `plain` has them; the first part of these says what
        steering breaks.

        Parts that an earlier run has left in the work folder are read, if they were of the same questions and methods
        (`content`), so that more questions go on from fewer; within a part an interrupted run goes on."""
        parts = [asked[begin : begin + PART] for begin in range(0, len(asked), PART)]
        for number, part in enumerate(parts):
            self._measure_part(stage, number, content, part, arms)
        found = [json.loads(self._path(stage, number).read_text(encoding="utf-8")) for number in range(len(parts))]
        return {
            "questions": [question for one in found for question in one["questions"]],
            "arms": [
                {**arm, "metrics": [metrics for one in found for metrics in one["arms"][index]["metrics"]]}
                for index, arm in enumerate(found[0]["arms"])
            ],
            "notes": [note for one in found for note in one["notes"]],
        }

    def _measure_part(
        self, stage: str, number: int, content: Any, asked: Sequence[Question], arms: Callable[[], Sequence[Steered]]
    ) -> None:
        path, answers = self._path(stage, number), 0 if number else self.sizes.answers
        put = [[one.prompt, one.completions, one.labels] for one in asked]
        key = content_key([content, put, answers, self.identity])
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key:
            self.say(f"{path.stem}: from {path}")
            return
        self.say(path.stem)
        steered = arms()
        evaluation = evaluate_choices(
            self.base.model,
            self.base.tokenizer,
            asked,
            [column for one in steered for column in one.columns],
            [BASELINE, *(one.arm for one in steered)],
            damage=answers,
            kept=path.with_suffix(".partial"),
            progress=True,
        )
        write_json(path, {"key": key, **plain(evaluation)})

    def _path(self, stage: str, number: int) -> Path:
        return self.work / (f"{stage}-{number}.json" if number else f"{stage}.json")


def part_of(activations: Activations, *, share: float = 1.0, only: str | None = None) -> Activations:
    """The rows of one attribute, or of all, and of train those of the first groups by hash, so that less of the data
    is always a part of more."""
    kept: set[tuple[str, str]] = set()
    for name in activations.names:
        for label in (True, False):  # of texts that are groups by themselves, either side keeps its share
            rows = activations.rows(attribute=name, label=label, split=Split.TRAIN).tolist()
            groups = sorted({activations.groups[row] for row in rows}, key=lambda one: sha256(one.encode()).digest())
            kept |= {(name, group) for group in groups[: max(1, round(share * len(groups)))]}
    chosen = [
        row
        for row, (name, group, split) in enumerate(
            zip(activations.attributes, activations.groups, activations.splits, strict=True)
        )
        if only in (None, name) and (split is not Split.TRAIN or (name, group) in kept)
    ]
    at = torch.tensor(chosen)
    return replace(
        activations,
        values={site: values[at] for site, values in activations.values.items()},
        attributes=tuple(activations.attributes[row] for row in chosen),
        labels=activations.labels[at],
        groups=tuple(activations.groups[row] for row in chosen),
        splits=tuple(activations.splits[row] for row in chosen),
        samples=activations.samples[at],
    )


# What is compared.


def ablations(config: MatConfig, site: Site) -> dict[str, Variant]:
    """MAT-Steer without one of its parts."""
    recipes = {
        NO_NORM: Recipe(config, normalize=False),
        "no positive preservation": Recipe(replace(config, l_pos=0.0)),
        "no sparsity": Recipe(replace(config, l_sparse=0.0)),
        "no orthogonality": Recipe(replace(config, l_ortho=0.0)),
        ALIGNMENT: Recipe(replace(config, l_pos=0.0, l_sparse=0.0, l_ortho=0.0)),
    }
    return {name: Variant(recipe, site) for name, recipe in recipes.items()}


def methods(config: MatConfig, site: Site, simple: Site) -> dict[str, Variant]:
    """Those with a strength of their own: MAT-Steer at `site`, directions at the place that was `simple`'s best."""
    return {
        ITI: Variant(Recipe(ItiConfig()), None, (5.0, 10.0, 15.0), Pool.LAST),
        MEANS: Variant(Recipe(CaaConfig()), simple, (0.5, 1.0, 2.0)),
        PROBE: Variant(Recipe(ProbeConfig()), simple, (1.0, 2.0, 4.0)),
        MAT: Variant(Recipe(config), site, (1.0, 2.0, 3.0)),
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
    )
    results = (ArmResult.from_dict(arm["result"]) for arm in found["arms"][1:])
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


def plain(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation in JSON's types: of each arm its result, and the metrics of every question in order."""
    rows: dict[str, list[Any]] = {}
    for row in evaluation.rows:
        rows.setdefault(row["arm"], []).append(row["metrics"])
    first = [row for row in evaluation.rows if row["arm"] == evaluation.arms[0].arm]
    return {
        "questions": [[row["attribute"], row["cluster"]] for row in first],
        "arms": [
            {
                "name": arm.arm,
                "result": asdict(arm),
                "metrics": rows[arm.arm],
            }
            for arm in evaluation.arms
        ],
        "notes": list(evaluation.notes),
    }


def measured(found: Mapping[str, Any], places: Sequence[int] | None = None) -> dict[str, dict[str, Measured]]:
    """Arm -> metric -> what was measured of every question, or of those at `places`."""
    chosen = range(len(found["questions"])) if places is None else places
    measures: dict[str, dict[str, Measured]] = {}
    for arm in found["arms"]:
        for title in METRICS:
            attribute, name = title.rsplit(" ", 1)
            there = [
                (arm["metrics"][i][name], found["questions"][i][1])
                for i in chosen
                if found["questions"][i][0] == attribute and name in arm["metrics"][i]
            ]
            if there:
                parts = np.array([value if isinstance(value, list) else [value, 1.0] for value, _ in there])
                metric = TASK_METRICS[name]
                measures.setdefault(arm["name"], {})[title] = Measured(
                    parts, tuple(cluster for _, cluster in there), metric.combine, metric.rate
                )
    return measures


def line(
    name: str, found: Mapping[str, Any], measures: Mapping[str, Mapping[str, Measured]], **more: Any
) -> dict[str, Any]:
    """An arm as it stands in the results: estimates, differences to unsteered, damage."""
    result = next(ArmResult.from_dict(one["result"]) for one in found["arms"] if one["name"] == name)
    usual = found["arms"][0]["result"]["perplexity"]
    own, before = measures[name], measures[UNSTEERED]
    return {
        "method": name,
        **more,
        "metrics": {title: asdict(one.estimate()) for title, one in own.items()},
        "differences": {} if name == UNSTEERED else {title: asdict(own[title].minus(before[title])) for title in own},
        "perplexity_ratio": result.perplexity / usual if result.perplexity and usual else None,
        "damage": {title: asdict(one) for title, one in result.damage.items()},
    }


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
    at_places = try_out(
        study,
        "places",
        {
            MAT: [Variant(Recipe(config), site, (2.0,)) for site in study.candidates],
            MEANS: [Variant(Recipe(CaaConfig()), site, (1.0,)) for site in study.candidates],
        },
    )
    place, simple = (Site.parse(best_of(at_places, name)["place"]) for name in (MAT, MEANS))
    chosen = methods(config, place, simple)
    tried = try_out(study, "strengths", {name: [variant] for name, variant in chosen.items()})
    if more := further(tried, chosen):
        tried += try_out(study, "strengths-further", more)
    best = {name: best_of(tried, name) for name in chosen}
    parts_of_mat = ablations(config, place)
    variants = chosen | parts_of_mat
    multipliers = {name: best[name if name in best else MAT]["multiplier"] for name in variants}

    def measured_arms(stage: str, asked: Sequence[Question], chosen: Arms) -> dict[str, Any]:
        content = [[title, variant.settings(), multipliers[name]] for title, (name, variant) in chosen.items()]
        return study.measure(
            stage,
            content,
            asked,
            lambda: [study.steered(title, variant, multipliers[name]) for title, (name, variant) in chosen.items()],
        )

    both = (MAT, MEANS)
    pools = {
        f"{name}, {pool}": (name, pooled(variants[name], pool))
        for name in both
        for pool in (Pool.MEAN, Pool.LAST, Pool.TOKENS)
    }
    alone = {
        f"{name}, {attribute} alone": (name, replace(variants[name], only=attribute))
        for name in both
        for attribute in study.names
    }
    shares = {f"{name}, {share:.0%}": (name, replace(variants[name], share=share)) for name in both for share in SHARES}
    asked, on_dev_questions = study.tested(), study.asked(Split.DEV, sizes.dev)
    part = range(len(replace(study, sizes=replace(sizes, test=min(sizes.part, sizes.test))).tested()))
    test = measured_arms("test", asked, {name: (name, variants[name]) for name in (MAT, *parts_of_mat)})
    others = measured_arms("test-others", asked, {name: (name, one) for name, one in chosen.items() if name != MAT})
    shown = study.asked(Split.TRAIN, 8 * DEMONSTRATIONS)
    prompted = study.measure("in-context", [], in_context(asked, shown), list)
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
        "tried": [*at_places, *tried],
        "best": best,
        "notes": sorted(set(test["notes"])),
        "untrained": untrained,
    }
    yield results

    full, both_arms = measured(test, part), [arm for arm in test["arms"] if arm["name"] in both]
    for stage, arms in (("alone", alone), ("shares", shares)):
        found = measured_arms(stage, [asked[place] for place in part], arms)
        found["arms"] += both_arms
        measures = measured(found) | {name: full[name] for name in both}
        whose = {name: {"of": of, "share": one.share} for name, (of, one) in arms.items()}
        whose |= {name: {"of": name, "share": 1.0} for name in both}
        results[stage] = [line(name, found, measures, **whose[name]) for name in (*arms, *both)]
        untrained += study.untrained({name: one for name, (_, one) in arms.items()})
        yield results
    found = measured_arms("pools", on_dev_questions, pools)
    results["pools"] = [line(name, found, measured(found)) for name in pools]
    untrained += study.untrained({name: one for name, (_, one) in pools.items()})
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
        parser.add_argument(f"--{one.name}", type=int, default=one.default)
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
