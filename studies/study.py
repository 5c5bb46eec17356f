"""A model, data and the ways to measure steering on them, each stage's result kept in a folder: what `make
reproduce-real` compares methods with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from steering.column import Column
from steering.types import Site, SiteKind
from studies.real_results import METRICS, UNSTEERED
from training.activations import Pool
from training.activations.extraction import extract_under
from training.activations.store import Activations, model_hash, samples_hash
from training.data.samples import Sample, Split, Task
from training.data.sources import draw
from training.evaluation.choices import evaluate_choices
from training.evaluation.evaluator import drawn
from training.evaluation.results import BASELINE, Arm, ArmResult, Evaluation, Measured
from training.evaluation.search import Candidates
from training.evaluation.sweep_results import Goal
from training.evaluation.tasks import METRICS as TASK_METRICS
from training.evaluation.tasks import Prompting, Question, questions
from training.files import content_key, write_json
from training.methods.fit import Recipe, fit
from training.methods.mat import MatConfig
from training.models import Base

PART = 80  # questions that are measured at once
GOAL = Goal(tolerance=0.005)


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used; questions and texts are drawn by a fixed seed."""

    fit: int = 300
    """Texts of each side of an attribute that vectors are fitted on."""
    dev: int = 32
    """Questions of TruthfulQA that places and strengths are chosen on; of each of the others twice as many."""
    test: int = 128
    """The same, for the comparison on test."""
    skipped: int = 128
    """The same, of test, drawn before these and left out: they were read while the study was made."""
    part: int = 40
    """The same, the first of these, for what is beside it: attributes alone, and shares of the data."""
    answers: int = 64
    """Questions of dev that are answered in every arm, to see what steering breaks."""
    test_answers: int = 64
    """The same, of test."""
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
            first, count = each * self.sizes.skipped, each * self.sizes.test
            for place, question in enumerate(own[first : first + count]):
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

    def untrained(self, variants: Mapping[str, Variant]) -> dict[str, list[str]]:
        """Of MAT-Steer the attributes of which no epoch beat the start on dev: their gates look at nothing."""
        mats = {name: one for name, one in variants.items() if isinstance(one.recipe.config, MatConfig)}
        found = {name: self._untrained(one) for name, one in mats.items()}
        return {name: attributes for name, attributes in found.items() if attributes}

    def _untrained(self, variant: Variant) -> list[str]:
        path = self.work / f"untrained-{content_key([variant.settings(), self.identity])}.json"
        if not path.exists():
            path.write_text(json.dumps([one.attribute for one in self.columns(variant) if not one.gate_weight.any()]))
        found: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @cached_property
    def identity(self) -> list[str]:
        """What decides every fit beside the method."""
        return [model_hash(self.base.model), samples_hash(self.texts)]

    def measure(
        self,
        stage: str,
        content: Any,
        asked: Sequence[Question],
        arms: Callable[[], Sequence[Steered]],
        answers: int,
    ) -> dict[str, Any]:
        """Unsteered and every arm on the same questions, as `plain` has them; `answers` to the first part of these
        say what steering breaks.

        Parts that an earlier run has left in the work folder are read, if they were of the same questions and methods
        (`content`), so that more questions go on from fewer; within a part an interrupted run goes on."""
        parts = [asked[begin : begin + PART] for begin in range(0, len(asked), PART)]
        for number, part in enumerate(parts):
            self._measure_part(stage, number, content, part, arms, 0 if number else answers)
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
        self,
        stage: str,
        number: int,
        content: Any,
        asked: Sequence[Question],
        arms: Callable[[], Sequence[Steered]],
        answers: int,
    ) -> None:
        path = self._path(stage, number)
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
    return activations.of_rows(torch.tensor(chosen))


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
        "perplexity_range": result.perplexity_range,
        "shortfall": 0.0 if name == UNSTEERED else GOAL.shortfall(result),
        "damage": {title: asdict(one) for title, one in result.damage.items()},
    }
