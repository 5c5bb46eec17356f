"""Conditional activation steering (CAST, Lee et al., 2024, arXiv 2409.05907): a vector that acts on some prompts alone.

A condition is fitted to prompts of which some should be steered: the unit vector c along which they differ from the
others at an early site, and the threshold on the cosine between an activation there and c that tells them apart best
(F1, on the train split). The attributes' own vectors are added at later sites where the condition holds. The cosine
keeps its sign; the paper's, to the projection on c, does not.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from training.activations import Pool
from training.data.samples import Split
from training.errors import FitError, TrainingError
from training.methods.base import Direction, FitInputs, Method, MethodConfig, option
from training.methods.control import ControlConfig, control_vector, principal

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations

log = logging.getLogger(__name__)
POOR = 0.8  # F1 of a condition that is warned of


class Hold(StrEnum):
    """When a condition is read."""

    PROMPT = "prompt"
    """Once, at the last prompt token; it holds for the answer."""
    TOKEN = "token"
    """At every steered token."""


def _parse_site(given: str) -> "Site":
    from steering.errors import SteeringError
    from steering.types import Site

    try:
        return Site.parse(given)
    except SteeringError:
        raise TrainingError(f"--reads must be LAYER.SITE, as in 6.residual, got {given!r}.") from None


@dataclass(frozen=True)
class CastConfig(MethodConfig):
    condition: str | None = option(
        "of the data, the attribute whose positive prompts are steered.", default=None, metavar="NAME"
    )
    reads: "Site | None" = option(
        "where the condition is read.", default=None, type=str, parse=_parse_site, metavar="LAYER.SITE"
    )
    hold: Hold = option(
        "prompt: the condition is read once, at the last prompt token; token: at every token; default: prompt.",
        default=Hold.PROMPT,
    )
    direction: Direction = option("mean or pca; default: mean.", default=Direction.MEAN)

    def __post_init__(self) -> None:
        if self.condition is None or self.reads is None:
            raise FitError("--method cast needs --condition, an attribute of the data, and --reads, its LAYER.SITE.")
        if self.direction not in (Direction.MEAN, Direction.PCA):
            raise FitError(f"The direction of cast is mean or pca, not {self.direction}.")

    @property
    def place(self) -> tuple[str, "Site"]:
        """The condition's name and where it is read."""
        assert self.condition is not None
        assert self.reads is not None
        return self.condition, self.reads

    def conditions(self) -> tuple[str, ...]:
        return () if self.condition is None else (self.condition,)

    def extra_sites(self) -> tuple["Site", ...]:
        return () if self.reads is None else (self.reads,)

    def as_dict(self) -> dict[str, str | None]:
        return {
            "condition": self.condition,
            "reads": str(self.reads),
            "hold": self.hold.value,
            "direction": self.direction.value,
        }


@dataclass(frozen=True, eq=False)
class Condition:
    """Holds where the cosine between an activation and `vector` is beyond `threshold`."""

    vector: "Tensor"  # [D], unit
    threshold: float
    f1: float  # on what it was fitted to

    def holds(self, activations: "Tensor") -> "Tensor":
        """bool [N] for activations [N, D]."""
        return cosines(activations, self.vector) > self.threshold


def fit(inputs: FitInputs, config: CastConfig) -> Sequence["Column"]:
    """Attribute by attribute, each at all its sites; `condition.json` has the condition's F1. Raises FitError."""
    from steering.column import Column
    from steering.types import Gate, Reading

    condition_name, reads = config.place
    named = dict(inputs.by_attribute())
    if condition_name not in inputs.activations.names:
        raise FitError(f"--condition names {condition_name!r}; the data have {', '.join(inputs.activations.names)}.")
    if not (steered := [name for name in named if name != condition_name]):
        raise FitError(f"{condition_name!r} is the condition: name the data of what is steered, too.")
    for site in (site for name in steered for site in named[name]):
        if not reads < site:
            raise FitError(f"--reads {reads} has to come before {site}, which is steered.")
    condition = fit_condition(inputs.activations, condition_name, reads, config.direction)
    _tell(inputs, config, condition)
    vectors = ControlConfig(direction=config.direction)
    return [
        Column(
            name,
            site,
            Gate.COSINE,
            control_vector(inputs.activations, name, site, vectors),
            condition.vector,
            -condition.threshold,
            inputs.keep_norm,
            reads=Reading(reads, latched=config.hold is Hold.PROMPT),
        )
        for name in steered
        for site in named[name]
    ]


def fit_condition(
    activations: "Activations", name: str, site: "Site", direction: Direction = Direction.MEAN
) -> Condition:
    """From the last prompt tokens of an attribute's samples: the difference of the sides' means, or the first principal
    component of both, centred at the middle between their means; and the threshold with the best F1.

    Raises FitError where a side is empty, or the sides have the same mean."""
    import torch
    from torch.nn.functional import normalize as unit

    sides = _prompts(activations, name, site, Split.TRAIN)
    means = [side.mean(0) for side in sides]
    difference = means[0] - means[1]
    if not difference.any():
        raise FitError(f"The two sides of condition {name!r} have the same mean at {site}: nothing tells them apart.")
    vector = unit(difference, dim=0)
    if direction is Direction.PCA:
        vector = principal(torch.cat(sides) - (means[0] + means[1]) / 2)
        vector = vector if vector @ difference >= 0 else -vector
    threshold, f1 = best_threshold(*(cosines(side, vector) for side in sides))
    return Condition(vector, threshold, f1)


def cosines(activations: "Tensor", vector: "Tensor") -> "Tensor":
    """[N], between activations [N, D] and a unit vector [D]."""
    found: Tensor = (activations @ vector) / activations.norm(dim=1).clamp_min(1e-19)
    return found


def best_threshold(positive: "Tensor", negative: "Tensor") -> tuple[float, float]:
    """The threshold with the best F1 of `values > threshold`, in the middle of its gap between values, and that F1."""
    import torch

    values = torch.cat([positive, negative]).double().sort().values
    edges = torch.cat([values[:1] - 1e-3, (values[1:] + values[:-1]) / 2])
    hits = (positive.double()[None] > edges[:, None]).sum(1)
    alarms = (negative.double()[None] > edges[:, None]).sum(1)
    scores = 2 * hits / (len(positive) + hits + alarms)
    best = int(scores.argmax())
    return float(edges[best]), float(scores[best])


def f1_score(condition: Condition, positive: "Tensor", negative: "Tensor") -> float:
    hits, alarms = (int(condition.holds(side).sum()) for side in (positive, negative))
    return 2 * hits / (len(positive) + hits + alarms)


def _prompts(activations: "Activations", name: str, site: "Site", split: Split) -> list["Tensor"]:
    """Of the positive and of the negative prompts [N, D]: the first kept row of each sample, which is its last prompt
    token where every token is a row; without those that are attention sinks. Raises FitError where a side is empty."""
    import torch

    sides = []
    for label in (True, False):
        seen: dict[int, int] = {}
        for row in activations.rows(attribute=name, label=label, split=split).tolist():
            seen.setdefault(int(activations.samples[row]), row)
        if not seen:
            raise FitError(f"Condition {name!r} has no {'positive' if label else 'negative'} prompts in {split}.")
        sides.append(torch.tensor(list(seen.values())))
    return [activations.at(site)[rows] for rows in activations.without_sinks(site, *sides)]


def _tell(inputs: FitInputs, config: CastConfig, condition: Condition) -> None:
    name, site = config.place
    told: dict[str, float | str | None] = {"condition": name, "reads": str(site), "threshold": condition.threshold,
                                           "train F1": condition.f1}  # fmt: skip
    try:
        sides = _prompts(inputs.activations, name, site, Split.DEV)
        told["dev F1"] = f1_score(condition, *sides)
    except FitError:  # dev has one side alone
        told["dev F1"] = None
    if condition.f1 < POOR:
        log.warning("the condition %r is told apart badly at %s (F1 %.2f on train): try another --reads.",
                    name, site, condition.f1)  # fmt: skip
    if inputs.folder is not None:
        inputs.folder.mkdir(parents=True, exist_ok=True)
        (inputs.folder / "condition.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


CAST = Method(
    name="cast",
    summary="difference in means, where a condition on the prompt holds",
    title="conditional activation steering (CAST, arXiv 2409.05907)",
    config=CastConfig,
    fit=fit,
    site="residual",
    pool=Pool.TOKENS,
    one_place=False,
    layer_options=("reads",),
)
