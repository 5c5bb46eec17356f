"""How open each column's gate is on the two sides of its attribute: what the paper calls selectivity."""

from collections.abc import Sequence
from dataclasses import dataclass

from steering.operators import gate_codes, gate_values
from steering.types import Column, Gate
from training.activations.artifact import Activations
from training.data.samples import Split


@dataclass(frozen=True)
class GateMeans:
    """Mean gate of one column on the activations of one split."""

    attribute: str
    site: str
    split: str
    positive: float
    negative: float


def gate_means(activations: Activations, columns: Sequence[Column], splits: Sequence[Split]) -> list[GateMeans]:
    """Per column and split in which both sides of its attribute occur; a linear gate, which is a coordinate of the
    activation, has no state between closed and open to speak of."""
    found = []
    for column in columns:
        if column.gate is Gate.LINEAR:
            continue
        values = activations.values[column.site]
        for split in splits:
            rows = [activations.rows(attribute=column.attribute, label=label, split=split) for label in (True, False)]
            if not all(len(side) for side in rows):
                continue
            means = [
                float(
                    gate_values(
                        values[side],
                        column.gate_weight[None],
                        column.vector.new_tensor([column.gate_bias]),
                        gate_codes([column.gate]),
                    ).mean()
                )
                for side in rows
            ]
            found.append(GateMeans(column.attribute, str(column.site), split.value, *means))
    return found
