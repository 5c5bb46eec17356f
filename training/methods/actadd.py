"""Activation addition (Turner et al., 2023, arXiv 2308.10248): a vector from one pair of prompts, with no data.

The vector is the difference of the two prompts' activations at their last token. The paper pads the shorter prompt,
keeps the difference at every position, and adds it to the first positions of the user's prompt; here it is one vector
that is added at every steered position, so that it goes on to act in long answers.
"""

from dataclasses import dataclass

from training.activations import Pool
from training.data.samples import Sample, Split
from training.errors import FitError
from training.methods.base import Method, MethodConfig, option
from training.methods.caa import fit


@dataclass(frozen=True)
class ActAddConfig(MethodConfig):
    pair: tuple[str, str] | None = option(
        "the prompt to steer towards and the one away.", default=None, metavar="TEXT TEXT"
    )
    attribute: str | None = option("what requests call it; default: the first prompt.", default=None, metavar="NAME")

    def __post_init__(self) -> None:
        if self.pair is None:
            raise FitError("--method actadd needs --pair, the two prompts.")
        positive, negative = self.pair
        if not (positive.strip() and negative.strip()):
            raise FitError("A prompt of the pair is empty: both need at least one word.")
        if positive == negative:
            raise FitError(f"Both prompts of the pair are {positive!r}: there is no difference.")
        if not (self.name.isprintable() and 0 < len(self.name) <= 64):
            raise FitError(f"An attribute is 1 to 64 printable characters, not {self.name!r}: name it.")

    @property
    def prompts(self) -> tuple[str, str]:
        assert self.pair is not None
        return self.pair

    @property
    def name(self) -> str:
        """What requests call the difference; without a name, as the positive prompt reads."""
        return (self.prompts[0] if self.attribute is None else self.attribute).strip()

    def own_samples(self) -> list[Sample]:
        """The prompts as the labelled texts that `fit_difference` takes the difference of."""
        return [
            Sample(self.name, "", text, label, "pair", Split.TRAIN)
            for text, label in zip(self.prompts, (True, False), strict=True)
        ]

    def as_dict(self) -> dict[str, str]:
        positive, negative = self.prompts
        return {"positive": positive, "negative": negative}


ACTADD = Method(
    name="actadd",
    summary="difference of two prompts",
    title="activation addition from one pair of prompts (arXiv 2308.10248)",
    config=ActAddConfig,
    fit=fit,
    site="residual",
    pool=Pool.LAST,
    fitted_on="its --pair",
    one_place=False,
)
