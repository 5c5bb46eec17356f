"""Activation addition (Turner et al., 2023, arXiv 2308.10248): a vector from one pair of prompts, with no data.

The vector is the difference of the two prompts' activations at their last token. The paper pads the shorter prompt,
keeps the difference at every position, and adds it to the first positions of the user's prompt; here it is one vector
that is added at every steered position, so that it goes on to act in long answers.
"""

from dataclasses import dataclass
from typing import Self

from training.data.samples import Sample, Split
from training.errors import FitError


@dataclass(frozen=True)
class Pair:
    """The prompt to steer towards, the one to steer away from, and what requests call the difference."""

    positive: str
    negative: str
    attribute: str

    @classmethod
    def of(cls, positive: str, negative: str, attribute: str | None = None) -> Self:
        """Without a name, the attribute is called as the positive prompt reads. Raises FitError."""
        if not (positive.strip() and negative.strip()):
            raise FitError("A prompt of the pair is empty: both need at least one word.")
        if positive == negative:
            raise FitError(f"Both prompts of the pair are {positive!r}: there is no difference.")
        name = (positive if attribute is None else attribute).strip()
        if not (name.isprintable() and 0 < len(name) <= 64):
            raise FitError(f"An attribute is 1 to 64 printable characters, not {name!r}: name it.")
        return cls(positive, negative, name)

    def samples(self) -> list[Sample]:
        """The prompts as the labelled texts that `fit_difference` takes the difference of."""
        return [
            Sample(self.attribute, "", text, label, "pair", Split.TRAIN)
            for text, label in ((self.positive, True), (self.negative, False))
        ]

    def as_dict(self) -> dict[str, str]:
        return {"positive": self.positive, "negative": self.negative}
