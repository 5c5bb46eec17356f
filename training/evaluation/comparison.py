"""A stored checkpoint against its base model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from steering import checkpoint as checkpoints
from training.data.samples import Sample, Split
from training.evaluation.arms import BASELINE, Arm, default_arm, single_arms
from training.evaluation.generation import Continuation
from training.evaluation.measure import Measure
from training.evaluation.results import Evaluation
from training.models import Base


def open_checkpoint(path: Path) -> tuple[checkpoints.Checkpoint, Path]:
    """A checkpoint and its folder; a folder of versions stands for its latest. Raises CheckpointError."""
    if not (path / checkpoints.CONFIG).exists() and path.is_dir():
        path = checkpoints.find(path.resolve().parent, path.resolve().name)
    return checkpoints.load(path), path


def compare(
    base: Base,
    checkpoint: checkpoints.Checkpoint,
    samples: Sequence[Sample],
    measure: Measure,
    split: Split,
    *,
    factors: Sequence[float] = (1.0,),
    baseline: bool = True,
    alone: bool = False,
    extra: Mapping[str, float] | None = None,
    progress: bool = False,
) -> tuple[Evaluation, list[Continuation]]:
    """Evaluate the checkpoint: every factor on its default multipliers, `alone` each attribute by itself, `extra` one
    arm with exactly these multipliers. Raises CheckpointMismatch for a model that it was not made for."""
    checkpoints.verify_against(checkpoint, checkpoints.base_model_info(base.model, base.id, base.revision))
    checkpoints.verify_sites(checkpoint, base.model)
    columns = checkpoint.columns
    arms = [BASELINE] if baseline else []
    arms += [default_arm(columns, factor, "steered" if factor == 1 else f"{factor:g} x") for factor in factors]
    if alone:
        arms += single_arms(columns)
    if extra:
        arms.append(Arm(", ".join(f"{name} {value:g}" for name, value in extra.items()), extra))
    return measure.run(base, columns, arms, samples, split, progress=progress)
