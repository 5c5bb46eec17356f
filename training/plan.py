"""What a training run is asked for."""

from dataclasses import dataclass, field
from pathlib import Path

from steering import checkpoint as checkpoints
from steering.errors import NotFound
from steering.types import Site
from training.choices import Pool
from training.errors import TrainingError
from training.evaluation.measure import Measure
from training.methods.fit import Recipe


@dataclass(frozen=True)
class Plan:
    """Everything that a training run is asked for, but the model."""

    data: tuple[str, ...]
    sites: tuple[Site, ...]
    out: Path
    activations: Path | None = None
    """A folder of stored ones, in place of an extraction; `data` are then only evaluated on."""
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
