"""From labelled text to a checkpoint folder in five steps, each leaving an artifact in the work folder.

1. data         the samples with their splits        samples.jsonl
2. activations  what the model does on them          activations-KEY/
3. fit          the columns                          fit-KEY/SITE/ (state and log of each epoch)
4. evaluate     the arms side by side, on test       evaluation-VERSION/
5. checkpoint   tensors, model card, config.json     OUT/VERSION/

A run that was interrupted finds the finished artifacts and goes on; KEY is a hash of all that decides the content.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steering import checkpoint as checkpoints
from steering.errors import NotFound
from steering.types import Column, Positions, Site
from training.activations import Activations
from training.arms import BASELINE, default_arm, single_arms
from training.card import render
from training.choices import Pool
from training.data.records import Sample, Split
from training.data.registry import load_data
from training.data.splits import FRACTIONS, split_samples
from training.errors import DataError, TrainingError
from training.extraction import extract_under
from training.files import content_key, write_bytes
from training.fit import Recipe, fit
from training.gates import gate_means
from training.measure import Measure
from training.models import Base
from training.report import store
from training.results import Evaluation

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Everything that a training run is asked for, but the model."""

    data: tuple[str, ...]
    sites: tuple[Site, ...]
    out: Path
    recipe: Recipe = field(default_factory=Recipe)
    measure: Measure = field(default_factory=Measure)
    pool: Pool = Pool.MEAN
    version: str | None = None
    """None: the next of v1, v2, ..."""
    overwrite: bool = False
    seed: int = 0
    work: Path | None = None
    """None: OUT/.work."""
    max_rows: int = 64
    evaluated: bool = True
    progress: bool = False

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """Those of attributes with places of their own included."""
        return tuple(dict.fromkeys((*self.sites, *self.recipe.own_sites)))

    @property
    def workspace(self) -> Path:
        return self.work or self.out / ".work"


def train(base: Base, plan: Plan, say: Say = lambda _: None) -> tuple[checkpoints.Checkpoint, Evaluation | None]:
    """Run the five steps. Raises TrainingError or SteeringError with one sentence."""
    name, version = plan.out.resolve().name, next_version(plan)
    say(f"1/5 data: {', '.join(plan.data)}")
    samples = prepare_data(plan)
    say(f"2/5 activations of {len(samples)} samples at {', '.join(map(str, plan.all_sites))}")
    activations = extract_for(base, samples, plan)
    say(f"3/5 fit: {plan.recipe.method.value}")
    columns = fit_for(activations, plan)
    say("4/5 evaluate on test")
    evaluation = evaluate_for(base, samples, columns, plan, version, say)
    say(f"5/5 checkpoint: {plan.out / version}")
    return write_checkpoint(base, samples, activations, columns, evaluation, plan, name, version), evaluation


def prepare_data(plan: Plan) -> list[Sample]:
    samples = split_samples(load_data(plan.data), seed=plan.seed)
    known = dict.fromkeys(sample.attribute for sample in samples)
    for name in (*plan.recipe.strengths, *plan.recipe.defaults, *plan.recipe.places):
        if name and name not in known:
            raise DataError(f"There is no attribute {name!r} in the data; there are {', '.join(known)}.")
    if not plan.sites and (homeless := [name for name in known if name not in plan.recipe.places]):
        raise DataError(f"Attribute {homeless[0]!r} has no place: name its layer and site.")
    rows = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_bytes(plan.workspace / "samples.jsonl", rows.encode())
    return samples


def extract_for(base: Base, samples: Sequence[Sample], plan: Plan) -> Activations:
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
    base: Base, samples: Sequence[Sample], columns: Sequence[Column], plan: Plan, version: str, say: Say
) -> Evaluation | None:
    """Unsteered, all attributes, and each alone, on test; None where there is nothing to evaluate on."""
    if not plan.evaluated:
        return None
    arms = [BASELINE, default_arm(columns), *(single_arms(columns) if len({c.attribute for c in columns}) > 1 else ())]
    try:
        evaluation, texts = plan.measure.run(base, columns, arms, samples, Split.TEST, progress=plan.progress)
    except DataError as error:
        if plan.measure.judge is not None:
            raise
        say(f"not evaluated: {error}")
        return None
    store(evaluation, plan.workspace / f"evaluation-{version}", texts=texts)
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
    training: dict[str, Any] = {
        "data": [_source(spec) for spec in plan.data],
        "splits": {"fractions": list(FRACTIONS), "seed": plan.seed, "counts": count_samples(samples)},
        "hyperparameters": {"pool": plan.pool.value, **plan.recipe.as_dict()},
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
    )


def next_version(plan: Plan) -> str:
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


def count_samples(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    counts = []
    for attribute in dict.fromkeys(sample.attribute for sample in samples):
        for split in Split:
            own = [sample for sample in samples if sample.attribute == attribute and sample.split is split]
            positive = sum(sample.label for sample in own)
            counts.append(
                {
                    "attribute": attribute,
                    "split": split.value,
                    "positive": positive,
                    "negative": len(own) - positive,
                    "groups": len({sample.group for sample in own}),
                }
            )
    return counts


def libraries() -> dict[str, str]:
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _source(spec: str) -> dict[str, str]:
    name, _, path = spec.partition("=")
    return {"name": name, "path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
