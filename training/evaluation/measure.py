"""One way to evaluate, for `train`, `evaluate` and `sweep`: a judge's verdicts where there is one, else choices."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from steering.types import Column, Positions
from training.data.samples import Sample, Split
from training.errors import DataError
from training.evaluation.arms import Arm
from training.evaluation.evaluate import Question, evaluate_choices, evaluate_generations, questions
from training.evaluation.generation import Continuation, Sampling
from training.evaluation.judges import Judge, Prompt, prompts_of
from training.evaluation.results import Evaluation
from training.models import Base


@dataclass(frozen=True, eq=False)
class Measure:
    judge: Judge | None = None
    prompts: Sequence[Prompt] = ()
    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    """At most so many prompts, the first ones, or so many questions of each attribute, drawn by a fixed seed."""
    positions: Positions = Positions.GENERATED
    max_rows: int = 128

    def __post_init__(self) -> None:
        if (self.judge is None) != (not self.prompts):
            raise DataError("A judge and prompts belong together: give both or neither.")

    def check(self, samples: Sequence[Sample], split: Split, names: Sequence[str] = ()) -> None:
        """Raises DataError where `run` would find nothing to evaluate on, or without a judge nothing on one of the
        attributes `names`; before any model is loaded."""
        if self.judge is not None:
            prompts_of(self.prompts, split, self.limit)
            return
        asked = questions([sample for sample in samples if sample.split is split])
        if missing := [name for name in names if name not in {question.attribute for question in asked}]:
            raise DataError(
                f"No prompt of attribute {missing[0]!r} has both a positive and a negative completion on {split}, so "
                "there is nothing to choose from; to judge generated answers instead, give --judge and --prompts."
            )

    def run(
        self,
        base: Base,
        columns: Sequence[Column],
        arms: Sequence[Arm],
        samples: Sequence[Sample],
        split: Split,
        *,
        progress: bool = False,
    ) -> tuple[Evaluation, list[Continuation]]:
        """Evaluate on one split. Raises DataError where it holds nothing to evaluate on."""
        if self.judge is not None:
            prompts = prompts_of(self.prompts, split, self.limit)
            return evaluate_generations(
                base.model,
                base.tokenizer,
                prompts,
                self.judge,
                columns,
                arms,
                self.sampling,
                positions=self.positions,
                max_rows=self.max_rows,
                progress=progress,
            )
        asked = _drawn(questions([sample for sample in samples if sample.split is split]), self.limit)
        evaluation = evaluate_choices(
            base.model,
            base.tokenizer,
            asked,
            columns,
            arms,
            positions=self.positions,
            max_rows=self.max_rows,
            progress=progress,
        )
        return evaluation, []


def _drawn(asked: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` of each attribute, in their order."""
    if limit is None:
        return list(asked)
    chosen: set[int] = set()
    for name in dict.fromkeys(question.attribute for question in asked):
        own = [index for index, question in enumerate(asked) if question.attribute == name]
        chosen |= set(random.Random(0).sample(own, min(limit, len(own))))
    return [question for index, question in enumerate(asked) if index in chosen]
