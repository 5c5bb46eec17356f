"""The one record type that every data set loader gives."""

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
