"""The one record type that every data set becomes."""

from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    TRAIN = "train"
    DEV = "dev"
    TEST = "test"


@dataclass(frozen=True)
class Sample:
    """One labelled text: `prompt` followed, character for character, by `completion`.

    `label` is True on the side to steer towards. `group` is the unit of splitting (a question or fact id): samples of
    one group never land in different splits. `split` is the data set's own choice, which wins over the seeded one.
    """

    attribute: str
    prompt: str
    completion: str
    label: bool
    group: str
    split: Split | None = None

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def question_sample(
    attribute: str, question: str, answer: str, label: bool, *, group: str, split: Split | None = None
) -> Sample:
    """`Q: {question} A: {answer}`, the form of arXiv 2502.12446. The space belongs to the answer: most tokenizers begin
    a word with it, and a prompt that ends in one would be continued by tokens that the model has hardly seen there."""
    return Sample(attribute, f"Q: {question.strip()} A:", f" {answer.strip()}", label, group, split)
