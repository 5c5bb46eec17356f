"""What is compared: the same prompts under different multipliers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steering.types import Column, multipliers_of


@dataclass(frozen=True)
class Arm:
    """A named setting: attribute -> multiplier, 0 for attributes that are not named."""

    name: str
    attributes: Mapping[str, float] = field(default_factory=dict)

    def multipliers(self, columns: Sequence[Column]) -> tuple[float, ...]:
        """One multiplier a column; columns of one attribute share it. Raises ColumnError for an unknown name."""
        return multipliers_of(columns, self.attributes)


BASELINE = Arm("unsteered")


def default_arm(columns: Sequence[Column], scale: float = 1.0, name: str = "steered") -> Arm:
    """Every attribute at `scale` times its default multiplier."""
    return Arm(name, {column.attribute: scale * column.default_multiplier for column in columns})


def single_arms(columns: Sequence[Column], scale: float = 1.0) -> tuple[Arm, ...]:
    """One arm an attribute: that attribute alone."""
    full = default_arm(columns, scale).attributes
    return tuple(Arm(f"{name} alone", {name: value}) for name, value in full.items())
