"""The one record type that every data set becomes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

from training.errors import DataError


class Split(StrEnum):
    TRAIN = "train"
    DEV = "dev"
    TEST = "test"


class Form(StrEnum):
    """How a text reaches the model."""

    PLAIN = "plain"
    CHAT = "chat"


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Task(StrEnum):
    """What a data set asks, and by what its answers are measured."""

    CHOICE = "choice"  # of given completions, as a prompt's samples have them
    TRUTHFULQA = "truthfulqa"
    BBQ = "bbq"
    TOXIGEN = "toxigen"
    HELPSTEER = "helpsteer"


@dataclass(frozen=True)
class Item:
    """A question of a known data set with all of its answers, before it is put into a prompt."""

    task: Task
    question: str
    answers: tuple[str, ...]
    labels: tuple[bool, ...]
    context: str = ""
    best: tuple[int, ...] = ()
    """TruthfulQA: of the answers, the best one, then those of MC1 that are wrong; none where no best one is known."""
    ambiguous: bool | None = None
    """BBQ: whether the context leaves the question open."""
    unknown: int | None = None
    """BBQ: the answer that nothing is known."""
    biased: tuple[int, ...] | None = None
    """BBQ: the answers that follow the bias: the group that it is against where the question asks for something bad,
    else the others; None where the row does not say."""


def show_turns(turns: Sequence[Turn]) -> str:
    """For people and judges: what the user says, where that is all there is, else who says what."""
    if [turn.role for turn in turns] == ["user"]:
        return turns[0].content
    return "\n".join(map(": ".join, turns))


@dataclass(frozen=True)
class Sample:
    """One labelled text: `prompt` followed, character for character, by `completion`.

    With `turns` it is a conversation: the model's chat template renders them up to where the next answer begins, and
    `completion` is that answer; `prompt` then only shows the turns, for people and for telling prompts apart.

    `label` is True on the side to steer towards. `group` is the unit of splitting (a question or fact id): samples of
    one group never land in different splits. `split` is the data set's own choice, which wins over the seeded one.
    """

    attribute: str
    prompt: str
    completion: str
    label: bool
    group: str
    split: Split | None = None
    turns: tuple[Turn, ...] = ()
    question: str = field(default="", compare=False)
    """What a person would say in a conversation, where `prompt` has more around it."""
    item: Item | None = field(default=None, compare=False, repr=False)
    """What the sample's row is measured by, where that is more than its prompt's samples say."""
    score: float | None = field(default=None, compare=False)
    """How good the completion was found, where that is known in more degrees than `label`."""

    @property
    def form(self) -> Form:
        return Form.CHAT if self.turns else Form.PLAIN

    def as_chat(self) -> "Sample":
        """The sample as a conversation: its prompt is what the user says. Spaces before the answer are for plain text.

        Raises DataError where there is no prompt."""
        if self.turns:
            return self
        said = self.question or self.prompt
        if not said.strip():
            raise DataError("--chat makes the prompt a user's turn, and this text has no prompt")
        return replace(self, turns=(Turn("user", said),), completion=self.completion.lstrip())

    @property
    def text(self) -> str:
        return self.prompt + self.completion

    def as_dict(self) -> dict[str, Any]:
        """What the text and its place are, without what its row is measured by."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("item", "score")}


def question_sample(
    attribute: str, question: str, answer: str, label: bool, *, group: str, split: Split | None = None
) -> Sample:
    """`Q: {question} A: {answer}`, the form of arXiv 2502.12446. The space belongs to the answer: most tokenizers begin
    a word with it, and a prompt that ends in one would be continued by tokens that the model has hardly seen there."""
    question, answer = question.strip(), answer.strip()
    return Sample(attribute, f"Q: {question} A:", f" {answer}", label, group, split, question=question)


def dump_samples(samples: Iterable[Sample]) -> str:
    """JSON lines of the plain form, which are read as the same samples."""
    return "".join(json.dumps(_row(sample), ensure_ascii=False) + "\n" for sample in samples)


def _row(sample: Sample) -> dict[str, Any]:
    if sample.turns:
        turns = (*sample.turns, Turn("assistant", sample.completion))
        said: dict[str, Any] = {"messages": [turn._asdict() for turn in turns]}
    elif sample.prompt:
        said = {"prompt": sample.prompt, "completion": sample.completion}
    else:
        said = {"text": sample.completion}
    known = {"label": sample.label, "attribute": sample.attribute, "group": sample.group}
    return {**said, **known, **({"split": sample.split.value} if sample.split else {})}
