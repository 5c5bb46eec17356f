"""Questions with given answers, chosen from by likelihood in every arm."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steering.chat_template import ChatTemplate
from steering.column import Column
from steering.types import Positions
from training.activations.tokenization import Encoded, check_ids, encode
from training.data.samples import Form
from training.evaluation.damage import damaged, in_short, with_room
from training.evaluation.generation import Asked, Sampling
from training.evaluation.kept import Kept
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.neutral import TEXTS
from training.evaluation.results import (
    MANY,
    Arm,
    ArmMeasures,
    Evaluation,
    Measured,
    Parts,
    compared,
    note_on_many,
)
from training.evaluation.tasks import METRICS, Question, measure, unmeasured
from training.progress import Advance, progress_bar

BLOCK = 64  # rows of one arm that are scored, and kept, at once


@dataclass(frozen=True)
class _Scored:
    """One question in one arm: the log-likelihood and the number of tokens of each answer."""

    sums: list[float]
    lengths: list[int]


Scores = dict[tuple[int, int], _Scored]
"""(question, arm) -> what was found."""


def evaluate_choices(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    columns: Sequence[Column],
    arms: Sequence[Arm],
    *,
    chat: ChatTemplate | None = None,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 64,
    damage: int = 0,
    sampling: Sampling | None = None,
    before: ArmMeasures | None = None,
    kept: Path | None = None,
    progress: bool = False,
    advance: Advance = lambda _: None,
) -> Evaluation:
    """For each attribute and arm the metrics of its task (`METRICS`), with the paired differences to the unsteered arm.

    `damage`: so many of the prompts are answered in every arm, to see what steering breaks; 0: none. `before`: the
    unsteered model where it was measured on the same questions already, and is none of the arms; it comes first in what
    is found. `kept`: a file to which all that is measured is written as it comes, and from which an interrupted
    evaluation goes on; it is removed at the end. `advance` is told the share of the whole that has been done.
    """
    rows = [
        [encode(tokenizer, question.prompt, text, question.turns, chat) for text in question.completions]
        for question in asked
    ]
    check_ids(model, tokenizer, (row.ids for own in rows for row in own))
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    cut = sum(any(len(row.ids) > limit for row in own) for own in rows)
    rows = [[row.clipped(limit) for row in own] for own in rows]
    short = in_short(sampling or Sampling())
    prompts = with_room(model, tokenizer, _prompts(asked, damage), short, chat) if damage else []
    content = [[one.prompt, *one.completions, *map(list, one.turns)] for one in asked]
    whole = Kept.of(kept, model, columns, arms)
    store = whole.about("answers", content, positions.value, chat and chat.describe())
    total = len(arms) * (sum(map(len, rows)) + (len(prompts) + len(TEXTS) if prompts else 0))
    with progress_bar("measure", total, "texts", shown=progress, shares=advance) as tell:
        read = {(row["question"], row["arm"]): _Scored(row["sums"], row["lengths"]) for row in store.read()}
        # Nothing of a question where writing was cut short: its last arm is written last.
        scored = {(i, n): one for (i, n), one in read.items() if (i, len(arms) - 1) in read}
        tell(sum(len(found.sums) for found in scored.values()))
        for block in _blocks(rows, [i for i in range(len(asked)) if (i, 0) not in scored]):
            found = _score(model, [rows[i] for i in block], columns, arms, positions, max_rows, tell)
            new = {(block[place], number): one for (place, number), one in found.items()}
            scored |= new
            store.add({"question": i, "arm": n, **asdict(one)} for (i, n), one in new.items())
        measures = [_measures(asked, [scored[i, n] for i in range(len(asked))], arm) for n, arm in enumerate(arms)]
        if prompts:
            measures = damaged(
                model, tokenizer, measures, prompts, columns, short, chat=chat, positions=positions, max_rows=max_rows,
                kept=whole, advance=tell,
            )  # fmt: skip
    notes = list(unmeasured(asked))
    if cut:
        notes.append(f"{cut} of {len(asked)} questions are longer than the model reads: their beginning was cut off.")
    if damage and not prompts:
        notes.append(f"damage: no prompt leaves room for an answer of {short.max_new_tokens} tokens.")
    results = compared([*([before] if before else []), *measures])
    if (count := sum(len(result.differences) for result in results)) > MANY:
        notes.append(note_on_many(count))
    form = Form.CHAT if any(question.turns for question in asked) else Form.PLAIN
    settings = {"questions": len(asked), "form": form.value, "positions": positions.value}
    whole.remove()
    lines = list(_lines(asked, arms, scored))
    return Evaluation("choice", results, settings, tuple(notes), lines, measures=measures)


def _blocks(rows: Sequence[Sequence[Encoded]], wanted: Sequence[int]) -> Iterator[list[int]]:
    """Questions that are scored together: neighbours in length, so that little is padded."""
    block: list[int] = []
    for index in sorted(wanted, key=lambda i: (rows[i][0].start, i)):
        block.append(index)
        if sum(len(rows[i]) for i in block) >= BLOCK:
            yield block
            block = []
    if block:
        yield block


def _score(
    model: Any,
    rows: Sequence[Sequence[Encoded]],
    columns: Sequence[Column],
    arms: Sequence[Arm],
    positions: Positions,
    max_rows: int,
    tell: Advance,
) -> Scores:
    """Every question of `rows` in every arm, all in one call, so that each prompt is read once."""
    flat = [row for own in rows for row in own]
    strengths = [arm.multipliers(columns) for arm in arms]
    scores = iter(
        log_likelihoods(
            model,
            flat * len(arms),
            columns=columns,
            multipliers=[one for one in strengths for _ in flat] if columns else None,
            positions=positions,
            max_rows=max_rows,
            advance=tell,
        )
    )
    return {
        (index, number): _Scored([float(values.sum()) for values in own], [len(values) for values in own])
        for number in range(len(arms))
        for index, question in enumerate(rows)
        if (own := [next(scores) for _ in question])
    }


def _measures(asked: Sequence[Question], scored: Sequence[_Scored], arm: Arm) -> ArmMeasures:
    parts: dict[str, dict[str, tuple[list[Parts], list[str]]]] = {}
    for question, found in zip(asked, scored, strict=True):
        for name, own in measure(question, found.sums, found.lengths).items():
            values, clusters = parts.setdefault(question.attribute, {}).setdefault(name, ([], []))
            values.append(own)
            clusters.append(question.cluster or question.prompt)
    return ArmMeasures(
        arm,
        {
            f"{attribute} {name}": Measured(
                np.array(values), tuple(clusters), METRICS[name].combine, METRICS[name].rate
            )
            for attribute, own in parts.items()
            for name in METRICS
            if name in own
            for values, clusters in [own[name]]
        },
    )


def _prompts(asked: Sequence[Question], count: int) -> list[tuple[Asked, str]]:
    """At most so many prompts, the attributes' in turn, each beside its cluster."""
    by_attribute = [
        [question for question in asked if question.attribute == name]
        for name in dict.fromkeys(question.attribute for question in asked)
    ]
    turns = [own[place] for place in range(max(map(len, by_attribute))) for own in by_attribute if place < len(own)]
    distinct = {question.turns or question.prompt: question for question in turns if question.turns or question.prompt}
    chosen = list(distinct.values())[:count]
    return [(one.turns or one.prompt, one.cluster or one.prompt) for one in chosen]


def _lines(asked: Sequence[Question], arms: Sequence[Arm], scored: Scores) -> Iterator[dict[str, Any]]:
    """What was measured of every question in every arm; a metric of several parts as these."""
    for number, arm in enumerate(arms):
        for index, question in enumerate(asked):
            found = scored[index, number]
            parts = measure(question, found.sums, found.lengths)
            yield {
                "arm": arm.name,
                "attribute": question.attribute,
                "task": question.task.value,
                "cluster": question.cluster,
                "question": question.item.question if question.item else question.prompt,
                "answers": list(question.completions),
                "right": list(question.labels),
                "log_likelihoods": [round(value, 4) for value in found.sums],
                "tokens": found.lengths,
                "metrics": {name: own[0] if own[1:] == (1.0,) else list(own) for name, own in parts.items()},
            }
