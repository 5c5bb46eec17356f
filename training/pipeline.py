"""From labelled text to a checkpoint folder in five steps, each leaving an artifact in the work folder.

1. data         the samples with their splits        samples.jsonl
2. activations  what the model does on them          activations-KEY/, or the folder that was given
3. fit          the columns                          fit-KEY/SITE/ (state and log of each epoch)
4. evaluate     the arms side by side, on test       evaluation-VERSION/
5. checkpoint   tensors, model card, config.json     OUT/VERSION/

A run that was interrupted finds the finished artifacts and goes on; KEY is a hash of all that decides the content.
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version as installed
from typing import Any

from steering import checkpoint as checkpoints
from steering.types import Column, Positions
from training.activations.artifact import Activations, stored_samples
from training.activations.extraction import extract_under
from training.activations.stored import describe_stored, open_stored, split_as_stored
from training.card import render
from training.choices import Method
from training.data.samples import Sample, Split
from training.data.sources import DataSpec, load_data
from training.data.splits import FRACTIONS, SPLITS, dump_splits, split_samples
from training.data.summary import count_samples, missing_sides
from training.errors import DataError
from training.evaluation.arms import BASELINE, default_arm, single_arms
from training.evaluation.gates import gate_means
from training.evaluation.report import store
from training.evaluation.results import Evaluation
from training.files import content_key, write_bytes
from training.methods.fit import Recipe, fit
from training.models import Base
from training.plan import Plan, next_version

LIBRARIES = ("numpy", "safetensors", "scikit-learn", "torch", "transformers")
Say = Callable[[str], None]


def train(
    load: Callable[[], Base], plan: Plan, say: Say = lambda _: None
) -> tuple[checkpoints.Checkpoint, Evaluation | None]:
    """Run the five steps. `load`: the model, once the data are known to be sound. Raises TrainingError or
    SteeringError with one sentence."""
    name, version = plan.out.resolve().name, next_version(plan)
    say(f"1/5 data: {plan.origin}")
    samples = prepare_data(plan)
    texts = texts_for(samples, plan)
    base = load()
    say(f"2/5 activations of {len(samples)} samples at {', '.join(map(str, plan.all_sites))}")
    activations = activations_for(base, samples, plan)
    say(f"3/5 fit: {plan.recipe.method.value}")
    columns = fit_for(activations, plan)
    say("4/5 evaluate on test")
    evaluation = evaluate_for(base, texts, columns, plan, version, say)
    say(f"5/5 checkpoint: {plan.out / version}")
    return write_checkpoint(base, samples, activations, columns, evaluation, plan, name, version), evaluation


def read_samples(data: Sequence[str], recipe: Recipe, seed: int) -> list[Sample]:
    """The samples of every NAME=PATH with their splits, or the recipe's pair of prompts. Raises DataError, also where
    train lacks a side of an attribute, which every method but those two compares."""
    if recipe.pair:
        return recipe.pair.samples()
    samples = split_samples(load_data(data), seed=seed)
    if recipe.method is not Method.HEAD_ABLATION and (sentence := next(missing_sides(samples, [Split.TRAIN]), None)):
        raise DataError(sentence)
    return samples


def prepare_data(plan: Plan) -> list[Sample]:
    """The samples; where activations were given, without their texts. Raises DataError."""
    samples = stored_samples(plan.activations) if plan.activations else read_samples(plan.data, plan.recipe, plan.seed)
    known = dict.fromkeys(sample.attribute for sample in samples)
    for name in (*plan.recipe.strengths, *plan.recipe.defaults, *plan.recipe.places):
        if name and name not in known:
            raise DataError(f"There is no attribute {name!r} in the data; there are {', '.join(known)}.")
    if not plan.sites and (homeless := [name for name in known if name not in plan.recipe.places]):
        raise DataError(f"Attribute {homeless[0]!r} has no place: name its layer and site.")
    if plan.activations is None:
        rows = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        write_bytes(plan.workspace / "samples.jsonl", rows.encode())
    return samples


def texts_for(samples: Sequence[Sample], plan: Plan) -> Sequence[Sample]:
    """The samples with their texts; where activations were given, those of the data beside them, if any."""
    if plan.activations is None:
        return samples
    return split_as_stored(load_data(plan.data), samples, seed=plan.seed) if plan.data else []


def activations_for(base: Base, samples: Sequence[Sample], plan: Plan) -> Activations:
    if plan.activations is not None:
        return open_stored(plan.activations, base, plan.all_sites)
    return extract_under(
        plan.workspace,
        base.model,
        base.tokenizer,
        samples,
        plan.all_sites,
        pool=plan.pool,
        max_rows=plan.max_rows,
        progress=plan.progress,
    )


def fit_for(activations: Activations, plan: Plan) -> tuple[Column, ...]:
    key = content_key({"activations": dict(activations.source), "recipe": plan.recipe.settings()})
    return fit(activations, plan.sites, plan.recipe, folder=plan.workspace / f"fit-{key}", progress=plan.progress)


def evaluate_for(
    base: Base, texts: Sequence[Sample], columns: Sequence[Column], plan: Plan, version: str, say: Say
) -> Evaluation | None:
    """Unsteered, all attributes, and each alone, on test; None where there is nothing to evaluate on."""
    if not plan.evaluated:
        return None
    if not texts and plan.measure.judge is None:
        say("not evaluated: activations hold no texts to choose from; give --data too, or --judge and --prompts.")
        return None
    arms = [BASELINE, default_arm(columns), *(single_arms(columns) if len({c.attribute for c in columns}) > 1 else ())]
    try:
        evaluation, generated = plan.measure.run(base, columns, arms, texts, Split.TEST, progress=plan.progress)
    except DataError as error:
        if plan.measure.judge is not None:
            raise
        say(f"not evaluated: {error}")
        return None
    store(evaluation, plan.workspace / f"evaluation-{version}", texts=generated)
    return evaluation


def write_checkpoint(
    base: Base,
    samples: Sequence[Sample],
    activations: Activations,
    columns: Sequence[Column],
    evaluation: Evaluation | None,
    plan: Plan,
    name: str,
    version: str,
) -> checkpoints.Checkpoint:
    gates = gate_means(activations, columns, tuple(Split))
    given = [describe_stored(plan.activations)] if plan.activations else []
    shares = {} if plan.activations else {"fractions": list(FRACTIONS), "seed": plan.seed}
    training: dict[str, Any] = {
        "data": [*given, *(DataSpec.parse(spec).describe() for spec in plan.data)],
        "splits": {**shares, "counts": count_samples(samples)},
        "hyperparameters": {"pool": activations.pool.value, **plan.recipe.as_dict()},
        "gates": [asdict(mean) for mean in gates],
        "seed": plan.seed,
        "libraries": libraries(),
    }
    positions = plan.measure.positions
    card = render(
        name=name,
        version=version,
        method=plan.recipe.method.value,
        base_model=base.id,
        columns=columns,
        training=training,
        gates=gates,
        evaluation=evaluation,
        positions=positions.value,
    )
    return checkpoints.save(
        plan.out / version,
        name=name,
        version=version,
        method=plan.recipe.method.value,
        base_model=checkpoints.base_model_info(base.model, base.id, base.revision),
        columns=columns,
        normalize=plan.recipe.keep_norm,
        positions=Positions(positions),
        training=training,
        evaluation=evaluation.as_dict() if evaluation else {},
        card=card,
        extra_files={SPLITS: dump_splits(samples, seed=plan.seed)},
    )


def libraries() -> dict[str, str]:
    """The versions that decide what a fit gives."""
    return {"python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}}
