"""From labelled text to a checkpoint folder in five steps, each leaving an artifact in the work folder.

1. data         the samples with their splits        samples.jsonl
2. activations  what the model does on train and dev activations-KEY/, or the folder that was given
3. fit          the columns, where no place was      fit-KEY/SITE/ (state and log of each epoch),
                given at the best of some on dev     search/ (what was measured at each)
4. evaluate     the arms side by side, on test       evaluation-VERSION/
5. checkpoint   tensors, card, report, config.json   OUT/VERSION/

A run that was interrupted finds the finished artifacts and goes on; KEY is a hash of all that decides the content.
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version as installed
from math import copysign
from pathlib import Path
from typing import Any

import torch

from steering import checkpoint as checkpoints
from steering.column import Column
from steering.errors import NotFound
from steering.types import Positions, Site
from training.activations import Pool
from training.activations.extraction import extract_under
from training.activations.store import (
    Activations,
    describe_stored,
    open_stored,
    split_as_stored,
    stored_form,
    stored_samples,
    stored_sites,
)
from training.data.samples import Sample, Split
from training.data.sources import DataSpec, draw_indices, load_data
from training.data.splits import FRACTIONS, SPLITS, dump_splits, split_samples
from training.data.summary import count_samples, missing_sides
from training.errors import DataError, TrainingError
from training.evaluation.evaluator import EXAMPLES, Evaluator, gate_means
from training.evaluation.html_report import REPORT, training_report
from training.evaluation.report import store
from training.evaluation.results import BASELINE, Evaluation, default_arm, single_arms
from training.evaluation.search import (
    Candidates,
    check_search,
    find_place,
    more_than_chance,
    quick,
    search_goal,
    unmoved,
)
from training.files import content_key, write_bytes
from training.methods.caa import CAA
from training.methods.fit import Recipe, fit
from training.model_card import render_card
from training.models import Base

LIBRARIES = ("numpy", "safetensors", "scikit-learn", "torch", "transformers")
STRONGER = 3.0  # times the vectors, of what changed nothing


@dataclass(frozen=True)
class TrainingRun:
    """Everything that a training run is asked for, but the model."""

    data: tuple[str, ...]
    sites: tuple[Site, ...]
    out: Path
    activations: Path | None = None
    """A folder of stored ones, in place of an extraction; `data` are then only evaluated on."""
    recipe: Recipe = field(default_factory=Recipe)
    evaluator: Evaluator = field(default_factory=Evaluator)
    pool: Pool = Pool.MEAN
    version: str | None = None
    """None: the next of v1, v2, ..."""
    overwrite: bool = False
    seed: int = 0
    chat: bool = False
    """Prompts of the data become turns of a user."""
    work: Path | None = None
    """None: OUT/.work."""
    max_rows: int = 64
    evaluated: bool = True
    report: Path | None = None
    """Where the HTML report goes; None: `report.html` in the checkpoint's folder."""
    search: Candidates | None = None
    """Among these a place is looked for on dev, in place of `sites`."""
    goal: tuple[str, ...] = ()
    """What counts there; none: what the attributes are measured by."""
    progress: bool = False

    @property
    def origin(self) -> str:
        """What is fitted on, in words."""
        return str(self.activations or ", ".join(self.data) or "a pair of prompts")

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Wherever activations are needed."""
        return self.recipe.all_sites(self.sites)

    @property
    def workspace(self) -> Path:
        return self.work or self.out / ".work"


def next_version(plan: TrainingRun) -> str:
    """The version asked for, or the next free vN. Raises TrainingError for one that exists already, and for a name or
    version that no checkpoint can have."""
    root, name = plan.out.resolve().parent, plan.out.resolve().name
    for what, text in (("name", name), ("version", plan.version or "v1")):
        if not checkpoints.NAME.fullmatch(text):
            raise TrainingError(f"The {what} of a checkpoint is letters, digits, '.', '_' and '-', not {text!r}.")
    if plan.version is None:
        taken = {version for n, version, _ in checkpoints.list_checkpoints(root) if n == name}
        return next(version for number in range(1, len(taken) + 2) if (version := f"v{number}") not in taken)
    try:
        checkpoints.find(root, name, plan.version)
    except NotFound:
        return plan.version
    if not plan.overwrite:
        raise TrainingError(f"Version {plan.version!r} of {plan.out} exists already: choose another or overwrite it.")
    return plan.version


Say = Callable[[str], None]


def train(
    load: Callable[[], Base], run: TrainingRun, say: Say = lambda _: None
) -> tuple[checkpoints.Checkpoint, Evaluation | None]:
    """Run the five steps. `load`: the model, once the data are known to be sound. Raises TrainingError or
    SteeringError with one sentence."""
    name, version = run.out.resolve().name, next_version(run)
    say(f"1/5 data: {run.origin}")
    samples = prepare_data(run)
    texts = [one for one in texts_for(samples, run) if one.attribute not in run.recipe.config.conditions()]
    if run.search is not None:
        check_search(run.evaluator, texts, search_goal(dict.fromkeys(one.attribute for one in samples), run.goal))
    if run.evaluated and run.evaluator.judge is not None:
        run.evaluator.check(texts, Split.TEST)
    base = load()
    if run.search is not None:
        run = replace(run, sites=_candidates(run.search, base, run))
    chosen = fitted_on(samples, run)
    fitted = fitted_texts(samples, chosen, run)
    say(f"2/5 activations of {len(chosen)} samples at {', '.join(map(str, run.all_sites))}")
    activations = activations_for(base, samples, chosen, run)
    if run.search is not None:
        say(f"looking for a place on dev, among {len(run.sites)}; --layer and --site name one")
        run = _placed(base, texts, activations, fitted, run, say)
    say(f"3/5 fit: {run.recipe.method.name}")
    columns = fit_for(activations, run, base, fitted)
    say("4/5 evaluate on dev, then on test" if run.evaluated else "4/5 no evaluation, as asked for (--no-evaluate)")
    _tell_of_no_effect(base, texts, columns, run, say)
    evaluation = evaluate_for(base, texts, columns, run, version, say)
    say(f"5/5 checkpoint: {run.out / version}")
    tested = (index for index, sample in enumerate(samples) if sample.split is Split.TEST)
    counted = [samples[index] for index in dict.fromkeys((*chosen, *tested))]
    return write_checkpoint(base, samples, counted, activations, columns, evaluation, run, name, version), evaluation


def fitted_on(samples: Sequence[Sample], run: TrainingRun) -> list[int]:
    """Where the samples are that a fit needs: of train and dev, and with a limit at most so many of each side of an
    attribute in either, of the same prompts as far as there are enough. Without one stored activations count as they
    are."""
    limit = run.evaluator.limit
    if run.activations and limit is None:
        return list(range(len(samples)))
    found: list[int] = []
    for split in (Split.TRAIN, Split.DEV):
        own = [index for index, sample in enumerate(samples) if sample.split is split]
        found += own if limit is None else [own[i] for i in draw_indices([samples[index] for index in own], limit)]
    return found


def fitted_texts(samples: Sequence[Sample], chosen: Sequence[int], run: TrainingRun) -> list[Sample]:
    """The texts that are fitted on; none where activations were given."""
    return [] if run.activations else [samples[index] for index in chosen]


def _candidates(search: Candidates, base: Base, run: TrainingRun) -> tuple[Site, ...]:
    sites = search.among(stored_sites(run.activations)) if run.activations else search.sites(base.model)
    if not sites:
        raise DataError(f"{run.activations} has no activations at such a layer and site.")
    return sites


def _placed(
    base: Base, texts: Sequence[Sample], activations: Activations, fitted: Sequence[Sample], run: TrainingRun, say: Say
) -> TrainingRun:
    """The run at the place that was found, as strong as it was best there unless a strength was given."""
    found = find_place(
        base, texts, activations, run.sites, run.recipe, run.evaluator, search_goal(activations.names, run.goal),
        run.workspace / "search", fitted_texts=fitted, progress=run.progress, say=say,
    )  # fmt: skip
    strengths = {"": found.multiplier, **run.recipe.strengths} if found.multiplier != 1 else run.recipe.strengths
    return replace(run, sites=(found.place,), recipe=replace(run.recipe, strengths=strengths))


def _tell_of_no_effect(
    base: Base, texts: Sequence[Sample], columns: Sequence[Column], run: TrainingRun, say: Say
) -> None:
    """Say so where steering at the defaults changes no score on dev, or none by more than chance."""
    if not run.evaluated or (not texts and run.evaluator.judge is None):
        return
    if not any(column.default_multiplier for column in columns):  # off, as asked for
        return
    try:
        evaluator = replace(quick(run.evaluator), damage=0)
        evaluator.check(texts, Split.DEV)
        arms = [BASELINE, default_arm(columns)]
        evaluation, _ = evaluator.evaluate(base, columns, arms, texts, Split.DEV, progress=run.progress)
    except DataError:  # dev has nothing to measure on, which is no fault
        return
    unsteered, steered = evaluation.arms
    moved = {name: one for name in unsteered.metrics if (one := steered.differences[name]).value is not None}
    if not moved or more_than_chance(moved.values()):
        return
    by = "half a point" if unmoved(moved.values()) else "more than chance"
    told = ", ".join(f"{name} {one.text(signed=True)} of {one.count}" for name, one in moved.items())
    say(f"warning: steering changed no score on dev by {by} ({told}). Try {_to_try(run, columns)}.")


def _to_try(run: TrainingRun, columns: Sequence[Column]) -> str:
    """What may change more, of what is not set yet."""
    recipe, method = run.recipe, run.recipe.method
    tries = []
    if run.search is None and method.one_place:
        tries.append("another place (without --layer and --site one is looked for)")
    if method.keep_norm is not None:  # an ablation has removed all there is
        names = dict.fromkeys(column.attribute for column in columns)
        more = {name: _stronger(recipe.strength(name)) for name in names}
        given = [name for name in recipe.strengths if name]  # one for all would not reach these
        options = [f"{name}={more[name]:g}" for name in names] if given else [f"{max(more.values(), key=abs):g}"]
        tries.append("more (" + " ".join(f"--strength {option}" for option in options) + ")")
    if method is CAA:
        tries.append("--method probe, where something else varies in the data")
    else:
        caa = "--method caa on --data" if method.fitted_on else "--method caa"
        tries.append(f"{caa}, which says whether the data have a direction at all")
    return ", or ".join(tries)


def _stronger(strength: float) -> float:
    return copysign(max(STRONGER, 2 * abs(strength)), strength)


def read_samples(data: Sequence[str], recipe: Recipe, seed: int, *, chat: bool = False) -> list[Sample]:
    """The samples of every NAME=PATH with their splits, or the recipe's pair of prompts. Raises DataError, also where
    train lacks a side of an attribute, which every method but those two compares."""
    if own := recipe.config.own_samples():
        return own
    samples = split_samples(load_data(data, chat=chat), seed=seed)
    if recipe.method.contrastive and (sentence := next(missing_sides(samples, [Split.TRAIN]), None)):
        raise DataError(sentence)
    return samples


def prepare_data(run: TrainingRun) -> list[Sample]:
    """The samples; where activations were given, without their texts. Raises DataError."""
    if run.activations:
        samples = stored_samples(run.activations)
    else:
        samples = read_samples(run.data, run.recipe, run.seed, chat=run.chat)
    known = dict.fromkeys(sample.attribute for sample in samples)
    for name in (*run.recipe.strengths, *run.recipe.defaults, *run.recipe.places):
        if name and name not in known:
            raise DataError(f"There is no attribute {name!r} in the data; there are {', '.join(known)}.")
    if not run.sites and run.search is None and (homeless := [name for name in known if name not in run.recipe.places]):
        raise DataError(f"Attribute {homeless[0]!r} has no place: name its layer and site.")
    if run.activations is None:
        rows = "".join(json.dumps(sample.as_dict(), ensure_ascii=False) + "\n" for sample in samples)
        write_bytes(run.workspace / "samples.jsonl", rows.encode())
    return samples


def texts_for(samples: Sequence[Sample], run: TrainingRun) -> Sequence[Sample]:
    """The samples with their texts; where activations were given, those of the data beside them, if any."""
    if run.activations is None:
        return samples
    if not run.data:
        return []
    texts = load_data(run.data, chat=run.chat)
    stored = stored_form(run.activations)
    if stored not in (None, texts[0].form):
        raise DataError(
            f"{run.activations} was extracted from {stored} data, and --data are {texts[0].form}: with --chat, prompts "
            "become turns of a user."
        )
    return split_as_stored(texts, samples, seed=run.seed)


def activations_for(base: Base, samples: Sequence[Sample], chosen: Sequence[int], run: TrainingRun) -> Activations:
    """Of the chosen ones of the samples: extracted, or what is stored of them."""
    if run.activations is not None:
        stored = open_stored(run.activations, base, run.all_sites)
        if len(chosen) == len(samples):
            return stored
        rows = torch.isin(stored.samples, torch.tensor(chosen)).nonzero().flatten()
        return replace(stored.of_rows(rows), source={**stored.source, "limit": run.evaluator.limit})
    return extract_under(
        run.workspace,
        base.model,
        base.tokenizer,
        fitted_texts(samples, chosen, run),
        run.all_sites,
        chat=base.chat,
        pool=run.pool,
        max_rows=run.max_rows,
        progress=run.progress,
    )


def fit_for(
    activations: Activations, run: TrainingRun, base: Base | None = None, samples: Sequence[Sample] = ()
) -> tuple[Column, ...]:
    key = content_key({"activations": dict(activations.source), "recipe": run.recipe.settings()})
    return fit(
        activations, run.sites, run.recipe, folder=run.workspace / f"fit-{key}", progress=run.progress, base=base,
        samples=samples,
    )  # fmt: skip


def evaluate_for(
    base: Base, texts: Sequence[Sample], columns: Sequence[Column], run: TrainingRun, version: str, say: Say
) -> Evaluation | None:
    """Unsteered, all attributes, and each alone, on test; None where there is nothing to evaluate on."""
    if not run.evaluated:
        return None
    if not texts and run.evaluator.judge is None:
        say("not evaluated: activations hold no texts to choose from; give --data too, or --judge and --prompts.")
        return None
    arms = [BASELINE, default_arm(columns), *(single_arms(columns) if len({c.attribute for c in columns}) > 1 else ())]
    folder = run.workspace / f"evaluation-{version}"
    try:
        evaluator = replace(run.evaluator, examples=EXAMPLES)
        evaluation, generated = evaluator.evaluate(
            base, columns, arms, texts, Split.TEST, progress=run.progress, kept=folder / "evaluation.partial"
        )
    except DataError as error:
        if run.evaluator.judge is not None:
            raise
        say(f"not evaluated: {error}")
        return None
    store(evaluation, folder, texts=generated)
    return evaluation


def write_checkpoint(
    base: Base,
    samples: Sequence[Sample],
    counted: Sequence[Sample],
    activations: Activations,
    columns: Sequence[Column],
    evaluation: Evaluation | None,
    run: TrainingRun,
    name: str,
    version: str,
) -> checkpoints.Checkpoint:
    gates = gate_means(activations, columns, tuple(Split))
    given = [describe_stored(run.activations)] if run.activations else []
    shares = {} if run.activations else {"fractions": list(FRACTIONS), "seed": run.seed}
    training: dict[str, Any] = {
        **{name: activations.source[name] for name in ("form", "chat_template") if name in activations.source},
        "data": [*given, *(DataSpec.parse(spec).describe() for spec in run.data)],
        "splits": {**shares, "counts": count_samples(counted)},
        "hyperparameters": {"pool": activations.pool.value, **run.recipe.as_dict()},
        "gates": [asdict(mean) for mean in gates],
        "seed": run.seed,
        **({"searched": Split.DEV.value} if run.search else {}),
        "libraries": libraries(),
    }
    positions = run.evaluator.positions
    card = render_card(
        name=name,
        version=version,
        method=run.recipe.method.name,
        base_model=base.id,
        columns=columns,
        training=training,
        gates=gates,
        evaluation=evaluation,
        positions=positions.value,
    )
    report = training_report(
        f"{name}@{version}", base.id, run.recipe.method.title, columns, training, gates, evaluation
    )
    if run.report is not None:
        write_bytes(run.report, report.encode())
    return checkpoints.save(
        run.out / version,
        name=name,
        version=version,
        method=run.recipe.method.name,
        base_model=checkpoints.base_model_info(base.model, base.id, base.revision),
        columns=columns,
        normalize=run.recipe.keep_norm,
        positions=Positions(positions),
        training=training,
        evaluation=evaluation.as_dict() if evaluation else {},
        card=card,
        extra_files={
            SPLITS: dump_splits(samples, seed=run.seed),
            **({} if run.report else {REPORT: report.encode()}),
        },
    )


def libraries() -> dict[str, str]:
    """The versions that decide what a fit gives."""
    return {"python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}}
