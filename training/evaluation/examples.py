"""The answers that a report shows token by token."""

from collections.abc import Sequence

from steering.column import Column
from steering.types import Positions
from training.activations.tokenization import Encoded, encode
from training.evaluation.generation import Continuation, encoded_prompt, shown
from training.evaluation.judged import Prompt
from training.evaluation.results import BASELINE, Arm
from training.evaluation.tasks import Question
from training.evaluation.traced import Example, trace_answer
from training.models import Base


def answered(
    base: Base,
    columns: Sequence[Column],
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    texts: Sequence[Continuation],
    positions: Positions,
    count: int,
) -> list[Example]:
    """The unsteered answer and the steered one to `count` prompts, the first whose answer steering has changed."""
    steering = _steering(arms)
    if not count or steering is None:
        return []
    pair = [arm for arm in (BASELINE, steering) if arm in arms]
    by_prompt: dict[int, dict[str, Continuation]] = {}
    for text in texts:
        if text.sample == 0:
            by_prompt.setdefault(text.prompt, {})[text.arm] = text
    changed = sorted(by_prompt, key=lambda number: len({by_prompt[number][arm.name].text for arm in pair}) < len(pair))
    found = []
    for number in sorted(changed[:count]):
        asked = prompts[number].asked
        ids = encoded_prompt(base.tokenizer, asked, base.chat)
        for arm in pair:
            text = by_prompt[number][arm.name]
            said = text.token_ids[: len(text.token_ids) - text.finished]
            row = Encoded((*ids, *said), len(ids) - 1, len(ids) + len(said) - 1)
            traced = trace_answer(base.model, base.tokenizer, row, columns, arm.multipliers(columns), positions)
            found.append(Example(shown(asked), arm.name, traced, text.verdict))
    return found


def chosen_from(
    base: Base,
    columns: Sequence[Column],
    arms: Sequence[Arm],
    asked: Sequence[Question],
    positions: Positions,
    count: int,
) -> list[Example]:
    """A positive and a negative answer to the first `count` questions of each attribute, as the steered arm reads
    them."""
    steering = _steering(arms)
    if not count or steering is None:
        return []
    limit = getattr(base.model.config, "max_position_embeddings", None) or 1 << 30
    found = []
    for name in dict.fromkeys(question.attribute for question in asked):
        for question in [one for one in asked if one.attribute == name][:count]:
            for label in (True, False):
                if label in question.labels:
                    answer = question.completions[question.labels.index(label)]
                    row = encode(base.tokenizer, question.prompt, answer, question.turns, base.chat).clipped(limit)
                    traced = trace_answer(
                        base.model, base.tokenizer, row, columns, steering.multipliers(columns), positions
                    )
                    said = f"{name}: a {'positive' if label else 'negative'} answer, {steering.name}"
                    found.append(Example(shown(question.turns or question.prompt), said, traced))
    return found


def _steering(arms: Sequence[Arm]) -> Arm | None:
    """The arm of the defaults, else the first that steers."""
    steering = [arm for arm in arms if any(arm.attributes.values())]
    return next((arm for arm in steering if arm.name == "steered"), steering[0] if steering else None)
