"""Answers that are generated to prompts in every arm, and a judge's verdicts on them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from steering.chat_template import ChatTemplate
from steering.column import Column
from steering.types import Positions
from training.data.loaders import messages_field
from training.data.rows import Row, check_fields, collect, read_rows, split_field, text_field
from training.data.samples import Form, Sample, Split, Task, Turn
from training.errors import DataError
from training.evaluation.damage import neutral_divergence, with_damage
from training.evaluation.generation import Asked, Continuation, Sampling, generate, shown
from training.evaluation.judges import Judge, Verdict, judge_key, verdicts
from training.evaluation.kept import Kept
from training.evaluation.neutral import TEXTS
from training.evaluation.results import MANY, Arm, ArmMeasures, Evaluation, Measured, compared, note_on_many
from training.evaluation.tasks import Prompting, put
from training.progress import Advance, progress_bar

FIELDS = ("prompt", "messages", "split", "group", "attribute", "completion", "label")
"""Of a file of prompts, which may be a training file: the last three say nothing here."""


@dataclass(frozen=True)
class Prompt:
    asked: Asked
    split: Split | None
    """None belongs to every split."""
    group: str = ""
    """Prompts of one group are not independent; without one, each prompt is."""
    attribute: str = ""
    """Of the data that it is from; their metrics are named after it."""


def load_prompts(path: Path) -> list[Prompt]:
    """JSON lines of `{"prompt" | "messages", "split"?, "group"?}`; one that is there again, as in a training file,
    counts once. Raises DataError with file and line."""

    def convert(row: Row) -> list[Prompt]:
        check_fields(row, FIELDS)
        return [Prompt(_asked(row), split_field(row), str(row.fields.get("group") or ""))]

    prompts = collect(str(path), partial(read_rows, path), convert)
    if not prompts:
        raise DataError(f"{path} holds no prompts.")
    return list({(prompt.asked, prompt.split): prompt for prompt in reversed(prompts)}.values())[::-1]


def prompts_from(samples: Sequence[Sample], form: Form, prompting: Prompting = Prompting.PLAIN) -> list[Prompt]:
    """What the data themselves ask, each once: a question, as `prompting` puts it, a sample's prompt, or a statement of
    ToxiGen to go on from. As `form` chat each is a user's turn, without what plain text has around it. Texts without a
    prompt ask nothing."""
    found: dict[tuple[str, Asked], Prompt] = {}
    for sample in samples:
        asked = _asked_by(sample, form, prompting)
        if asked:
            found.setdefault((sample.attribute, asked), Prompt(asked, sample.split, sample.group, sample.attribute))
    return list(found.values())


def _asked_by(sample: Sample, form: Form, prompting: Prompting) -> Asked:
    if sample.turns:
        return sample.turns
    chat = form is Form.CHAT
    if sample.item is None:
        said = sample.question if chat and sample.question else sample.prompt
    elif sample.item.task is Task.TOXIGEN:
        said = sample.item.question
    else:
        said = put(sample.item, Prompting.CHAT if chat else prompting)
    return (Turn("user", said),) if chat and said.strip() else said


def _asked(row: Row) -> Asked:
    """Of `messages` without the assistant's last turn, which is the answer of a training file."""
    if "messages" not in row.fields:
        return text_field(row, "prompt")
    if "prompt" in row.fields:
        raise DataError(f'{row.where}: "prompt" and "messages" are two ways to say one thing: give one.')
    turns = messages_field(row, least=1)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    if not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise DataError(f'{row.where}: "messages" must have a turn of the user, which is not empty.')
    return tuple(turns)


def prompts_of(prompts: Sequence[Prompt], split: Split, limit: int | None = None) -> list[Prompt]:
    """The (first `limit`) prompts of a split. Raises DataError where there is none."""
    chosen = [prompt for prompt in prompts if prompt.split in (None, split)]
    if not chosen:
        raise DataError(f"There is no prompt of the {split} split.")
    return chosen[:limit]


def evaluate_generations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judge: Judge,
    columns: Sequence[Column],
    arms: Sequence[Arm],
    sampling: Sampling,
    *,
    chat: ChatTemplate | None = None,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 128,
    before: ArmMeasures | None = None,
    progress: bool = False,
    kept: Path | None = None,
    advance: Advance = lambda _: None,
) -> tuple[Evaluation, list[Continuation]]:
    """Generate in every arm and judge: the rate of each metric where it applies, of each attribute that prompts are of,
    the damage that the texts show, and the paired differences to the unsteered arm, clustered by prompt or its group.
    The texts come along, judged.
    `before`, `kept` and `advance` are as in `evaluate_choices`."""
    if not prompts:
        raise DataError("There are no prompts to evaluate.")
    asked = [prompt.asked for prompt in prompts]
    whole = Kept.of(kept, model, columns, arms)
    total = len(arms) * (2 * len(prompts) * sampling.samples + len(TEXTS))  # each answer is generated and judged
    with progress_bar("measure", total, "texts", shown=progress, shares=advance) as tell:
        texts = generate(
            model, tokenizer, asked, columns, arms, sampling, chat=chat, positions=positions, max_rows=max_rows,
            advance=tell, kept=whole,
        )  # fmt: skip
        found = _verdicts(judge, [(shown(asked[text.prompt]), text.text) for text in texts], whole, tell)
        moved = neutral_divergence(model, tokenizer, columns, arms, kept=whole, advance=tell)
    texts = [
        replace(text, asked=shown(asked[text.prompt]), attribute=prompts[text.prompt].attribute, verdict=dict(verdict))
        for text, verdict in zip(texts, found, strict=True)
    ]
    clusters = [prompt.group or str(number) for number, prompt in enumerate(prompts)]
    size = len(texts) // len(arms)
    measures = [
        ArmMeasures(arm, judged(texts[number * size : (number + 1) * size], clusters))
        for number, arm in enumerate(arms)
    ]
    measures = with_damage(measures, texts, clusters, moved)
    results = compared([*([before] if before else []), *measures])
    count = sum(len(result.differences) for result in results)
    form = Form.PLAIN if all(isinstance(one, str) for one in asked) else Form.CHAT
    settings = {"prompts": len(prompts), "form": form.value, "positions": positions.value, **asdict(sampling)}
    whole.remove()
    notes = (note_on_many(count),) if count > MANY else ()
    return Evaluation("generation", results, settings, notes, measures=measures), texts


def _verdicts(judge: Judge, answers: Sequence[tuple[str, str]], kept: Kept, advance: Advance) -> list[Verdict]:
    """On every (prompt, text); the judge is asked about those that it was not asked about before."""
    store = kept.about("verdicts", judge_key(judge), answers)
    found: dict[int, Verdict] = {row["answer"]: row["verdict"] for row in store.read()}
    advance(len(found))
    missing = [place for place in range(len(answers)) if place not in found]
    for place, verdict in zip(missing, verdicts(judge, [answers[place] for place in missing]), strict=True):
        found[place] = verdict
        store.add([{"answer": place, "verdict": dict(verdict)}])
        advance(1)
    return [found[place] for place in range(len(answers))]


def judged(texts: Sequence[Continuation], clusters: Sequence[str]) -> dict[str, Measured]:
    """Per metric, of each attribute apart, whether it holds of the texts; where it does not apply it weighs nothing.
    `clusters` by prompt."""
    found = {}
    for attribute in dict.fromkeys(text.attribute for text in texts):
        own = [text for text in texts if text.attribute == attribute]
        ids = tuple(clusters[text.prompt] for text in own)
        for name in dict.fromkeys(name for text in own for name in text.verdict):
            verdicts = [text.verdict.get(name) for text in own]
            parts = np.array([(float(bool(one)), float(one is not None)) for one in verdicts])
            found[f"{attribute} {name}".strip()] = Measured(parts, ids, rate=True)
    return found
