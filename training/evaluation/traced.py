"""Texts with what steering did to each of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steering.column import Column, attribute_names
from steering.hook import steered
from steering.types import Positions
from training.activations.tokenization import Encoded
from training.evaluation.likelihood import steered_mask

UNSEEN = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class TracedToken:
    """What was done where this token came from. Of an attribute with several columns, the one that did most counts."""

    text: str
    gates: tuple[float, ...]
    """One an attribute."""
    strengths: tuple[float, ...]
    """Multiplier x gate, 0 where nothing was steered."""

    @property
    def shown(self) -> str:
        """With what cannot be seen made visible."""
        return self.text.translate(UNSEEN) or "∅"

    def about(self, attributes: Sequence[str]) -> str:
        """The numbers in words."""
        each = zip(attributes, self.gates, self.strengths, strict=True)
        return "; ".join(f"{name}: gate {gate:.2f}, multiplier x gate {strength:.2f}" for name, gate, strength in each)


@dataclass(frozen=True)
class Traced:
    attributes: tuple[str, ...]
    tokens: tuple[TracedToken, ...]


@dataclass(frozen=True)
class Example:
    """One answer to a prompt. `said`: whose it is, in words."""

    prompt: str
    said: str
    traced: Traced
    verdict: Mapping[str, bool | None] = field(default_factory=dict)


@torch.no_grad()
def trace_answer(
    model: Any,
    tokenizer: Any,
    row: Encoded,
    columns: Sequence[Column],
    multipliers: Sequence[float],
    positions: Positions = Positions.GENERATED,
) -> Traced:
    """Every token of an answer, steered as in a generation of it. multipliers: one a column."""
    names = tuple(attribute_names(columns))
    mask = steered_mask([row], positions)
    with steered(model, columns, list(multipliers), mask=mask) as steering:
        steering.record(True)
        model(torch.tensor([row.ids], device=model.device), use_cache=False)
        found: dict[str, list[tuple[list[float], list[float]]]] = {}
        for site, traces in steering.traces.items():
            for slot, column in enumerate(steering.bank.at(site).columns):
                if column is not None:
                    gates, strengths = traces[row.start : row.end, slot, :2].float().cpu().T.tolist()
                    found.setdefault(column.attribute, []).append((gates, strengths))
    texts = _texts(tokenizer, row)
    tokens = []
    for place, text in enumerate(texts):
        most = [
            max(
                ((gates[place], strengths[place]) for gates, strengths in found[name]),
                key=lambda one: (abs(one[1]), abs(one[0])),
            )
            for name in names
        ]
        tokens.append(TracedToken(text, tuple(gate for gate, _ in most), tuple(strength for _, strength in most)))
    return Traced(names, tuple(tokens))


def _texts(tokenizer: Any, row: Encoded) -> list[str]:
    """What each token adds to the text; nothing while a character is incomplete."""
    whole, written = row.ids[: row.end + 1], tokenizer.decode(row.ids[: row.start + 1])
    texts = []
    for end in range(row.start + 2, len(whole) + 1):
        now = tokenizer.decode(whole[:end])
        complete = not now.endswith("�") or end == len(whole)
        texts.append(now[len(written) :] if complete else "")
        written = now if complete else written
    return texts
