"""Results of an evaluation, and how they are stored."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from training.evaluation.statistics import Estimate


@dataclass(frozen=True)
class ArmResult:
    """One arm's metrics. The perplexity is that of the generated text under the unsteered model."""

    arm: str
    attributes: Mapping[str, float]
    metrics: Mapping[str, Estimate]
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    """Against the first arm."""

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "ArmResult":
        """The inverse of `dataclasses.asdict`."""
        metrics = {name: Estimate(**estimate) for name, estimate in stored["metrics"].items()}
        return cls(**{**stored, "metrics": metrics})


@dataclass(frozen=True)
class Evaluation:
    """The arms side by side, the first being what the others are compared with."""

    kind: str
    """"generation" or "choice"."""
    arms: tuple[ArmResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for arm in self.arms for name in arm.metrics))

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.arm == name)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `as_dict`."""
        return cls(stored["kind"], tuple(map(ArmResult.from_dict, stored["arms"])), stored["settings"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
