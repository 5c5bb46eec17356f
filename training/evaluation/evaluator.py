"""One way to evaluate, for `train`, `evaluate` and `sweep`: a judge's verdicts where there is one, else choices."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from steering import checkpoint as checkpoints
from steering.column import Column
from steering.operators import gate_codes, gate_values
from steering.types import Gate, Positions
from training.activations.store import Activations
from training.data.samples import Form, Sample, Split, Turn
from training.errors import DataError
from training.evaluation.choices import evaluate_choices
from training.evaluation.examples import answered, chosen_from
from training.evaluation.generation import Continuation, Sampling
from training.evaluation.judged import Prompt, evaluate_generations, prompts_from, prompts_of
from training.evaluation.judges import Judge
from training.evaluation.results import BASELINE, Arm, ArmMeasures, Evaluation, default_arm, single_arms
from training.evaluation.tasks import Prompting, Question, questions
from training.models import Base
from training.progress import Advance

EXAMPLES = 3
"""Prompts, or questions of each attribute, that a report shows token by token."""


@dataclass(frozen=True, eq=False)
class Evaluator:
    judge: Judge | None = None
    prompts: Sequence[Prompt] = ()
    """What the judged answers are generated to; none: what the data ask (`prompts_from`)."""
    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    """At most so many prompts, the first ones; of the data, so many of each attribute, drawn by a fixed seed."""
    positions: Positions = Positions.GENERATED
    max_rows: int = 128
    form: Form | None = None
    """Of what the judge's answers are generated to; None: chat, where the model has a template for it."""
    prompting: Prompting = Prompting.PRIMER
    """How questions of known data sets are put."""
    damage: int = 16
    """So many questions are answered in every arm without a judge, to see what steering breaks."""
    examples: int = 0
    """So many prompts, or questions of each attribute, are shown token by token (`Evaluation.examples`)."""

    def __post_init__(self) -> None:
        if self.judge is None and self.prompts:
            raise DataError("Prompts are for a judge: give one, or no prompts.")
        if self.form is Form.PLAIN and any(not isinstance(prompt.asked, str) for prompt in self.prompts):
            raise DataError("--plain-prompts is for texts, and some of the prompts are conversations (messages).")

    def check(self, samples: Sequence[Sample], split: Split, names: Sequence[str] = ()) -> None:
        """Raises DataError where `evaluate` would find nothing to evaluate on, or without a judge nothing on one of the
        attributes `names`; before any model is loaded."""
        if self.judge is not None:
            self._prompts(samples, split, self.form or Form.PLAIN)
            return
        asked = questions([sample for sample in samples if sample.split is split], self.prompting)
        if missing := [name for name in names if name not in {question.attribute for question in asked}]:
            raise DataError(
                f"No prompt of attribute {missing[0]!r} has both a positive and a negative completion on {split}, so "
                "there is nothing to choose from; to judge generated answers instead, give --judge and --prompts."
            )

    def evaluate(
        self,
        base: Base,
        columns: Sequence[Column],
        arms: Sequence[Arm],
        samples: Sequence[Sample],
        split: Split,
        *,
        before: ArmMeasures | None = None,
        progress: bool = False,
        kept: Path | None = None,
        advance: Advance = lambda _: None,
    ) -> tuple[Evaluation, list[Continuation]]:
        """Evaluate on one split; an interrupted call goes on from the file `kept`. `before` is the unsteered model,
        measured by an earlier call and none of the arms. `advance` is told shares of the whole. Raises DataError where
        the split holds nothing to evaluate on."""
        if self.judge is not None:
            form = self.form_for(base)
            prompts = self._prompts(samples, split, form)
            if form is Form.CHAT:
                prompts = [
                    replace(one, asked=(Turn("user", one.asked),)) if isinstance(one.asked, str) else one
                    for one in prompts
                ]
            evaluation, texts = evaluate_generations(
                base.model,
                base.tokenizer,
                prompts,
                self.judge,
                columns,
                arms,
                self.sampling,
                chat=base.chat,
                positions=self.positions,
                max_rows=self.max_rows,
                before=before,
                progress=progress,
                kept=kept,
                advance=advance,
            )
            notes = () if self.prompts else tuple(_unasked(samples, prompts, split))
            examples = answered(base, columns, arms, prompts, texts, self.positions, self.examples)
            return replace(evaluation, notes=(*notes, *evaluation.notes), examples=examples), texts
        own = [sample for sample in samples if sample.split is split]
        asked = drawn(questions(own, self.prompting), self.limit)
        evaluation = evaluate_choices(
            base.model,
            base.tokenizer,
            asked,
            columns,
            arms,
            chat=base.chat,
            positions=self.positions,
            max_rows=self.max_rows,
            damage=self.damage,
            sampling=self.sampling,
            before=before,
            kept=kept,
            progress=progress,
            advance=advance,
        )
        settings = {**evaluation.settings, "prompting": self.prompting.value}
        left_out = tuple(_left_out(own, asked, split))
        examples = chosen_from(base, columns, arms, asked, self.positions, self.examples)
        return replace(evaluation, settings=settings, notes=(*left_out, *evaluation.notes), examples=examples), []

    def _prompts(self, samples: Sequence[Sample], split: Split, form: Form) -> list[Prompt]:
        """Those that were given, else what the data of the split ask. Raises DataError where there is none."""
        if self.prompts:
            return prompts_of(self.prompts, split, self.limit)
        own = prompts_from([sample for sample in samples if sample.split is split], form, self.prompting)
        if not own:
            raise DataError(f"No data of {split} have a prompt that a judged answer could be generated to: --prompts.")
        if self.form is Form.PLAIN and any(not isinstance(prompt.asked, str) for prompt in own):
            raise DataError("--plain-prompts is for texts, and some of the data are conversations.")
        return drawn(own, self.limit)

    def form_for(self, base: Base) -> Form:
        """As it was chosen, else as the model has it."""
        return self.form or (Form.CHAT if base.chat else Form.PLAIN)

    def other_form(self, base: Base, samples: Sequence[Sample], split: Split, trained: str | None) -> str | None:
        """What to say where something is asked in another form than what a checkpoint was `trained` on; None: nothing.
        Raises DataError where nothing is asked."""
        if trained is None:
            return None
        own, kinds = Form(trained), {Form.PLAIN: "plain text", Form.CHAT: "conversations"}
        other = Form.PLAIN if own is Form.CHAT else Form.CHAT
        if self.judge is not None:
            if self.form_for(base) is own:
                return None
            asked = "the judge's prompts"
            to_change = {
                Form.PLAIN: "--plain-prompts",
                Form.CHAT: "--chat-prompts" if base.chat else "the model has no chat template",
            }
        else:
            found = questions([sample for sample in samples if sample.split is split], self.prompting)
            names = dict.fromkeys(question.attribute for question in found if question.form is other)
            if not names:
                return None
            asked = f"the questions of {', '.join(names)}"
            to_change = {Form.PLAIN: "leave out --chat and --prompting chat", Form.CHAT: "--chat"}
        return f"the checkpoint was trained on {kinds[own]}, and {asked} are {kinds[other]} ({to_change[own]})."


def _left_out(samples: Sequence[Sample], asked: Sequence[Question], split: Split) -> Iterator[str]:
    """A sentence for each attribute of the data that nothing is asked about."""
    there = {question.attribute for question in asked}
    for name in dict.fromkeys(sample.attribute for sample in samples):
        if name not in there:
            yield (
                f"{name}: not measured, since no prompt of {split} has both a right and a wrong answer; a judge can "
                "(--judge and --prompts)."
            )


def _unasked(samples: Sequence[Sample], prompts: Sequence[Prompt], split: Split) -> Iterator[str]:
    """A sentence for each attribute of the data that has no prompt."""
    there = {prompt.attribute for prompt in prompts}
    for name in dict.fromkeys(sample.attribute for sample in samples):
        if name not in there:
            yield f"{name}: not measured, since its texts of {split} have no prompt to answer."


class _OfAttribute(Protocol):
    @property
    def attribute(self) -> str: ...


_Asked = TypeVar("_Asked", bound=_OfAttribute)


def drawn(asked: Sequence[_Asked], limit: int | None) -> list[_Asked]:
    """At most `limit` of each attribute, in their order."""
    if limit is None:
        return list(asked)
    chosen: set[int] = set()
    for name in dict.fromkeys(question.attribute for question in asked):
        own = [index for index, question in enumerate(asked) if question.attribute == name]
        chosen |= set(random.Random(0).sample(own, min(limit, len(own))))
    return [question for index, question in enumerate(asked) if index in chosen]


def open_checkpoint(path: Path) -> tuple[checkpoints.Checkpoint, Path]:
    """A checkpoint and its folder; a folder of versions stands for its latest. Raises CheckpointError."""
    if not (path / checkpoints.CONFIG).exists() and path.is_dir():
        path = checkpoints.find(path.resolve().parent, path.resolve().name)
    return checkpoints.load(path), path


def compare(
    base: Base,
    checkpoint: checkpoints.Checkpoint,
    samples: Sequence[Sample],
    evaluator: Evaluator,
    split: Split,
    *,
    factors: Sequence[float] = (1.0,),
    baseline: bool = True,
    alone: bool = False,
    extra: Mapping[str, float] | None = None,
    progress: bool = False,
    kept: Path | None = None,
) -> tuple[Evaluation, list[Continuation]]:
    """Evaluate the checkpoint: every factor on its default multipliers, `alone` each attribute by itself, `extra` one
    arm with exactly these multipliers. Raises CheckpointMismatch for a model that it was not made for."""
    checkpoints.verify_against(checkpoint, checkpoints.base_model_info(base.model, base.id, base.revision))
    checkpoints.verify_sites(checkpoint, base.model)
    columns = checkpoint.columns
    arms = [BASELINE] if baseline else []
    arms += [default_arm(columns, factor, "steered" if factor == 1 else f"{factor:g} x") for factor in factors]
    if alone:
        arms += single_arms(columns)
    if extra:
        arms.append(Arm(", ".join(f"{name} {value:g}" for name, value in extra.items()), extra))
    return evaluator.evaluate(base, columns, arms, samples, split, progress=progress, kept=kept)


@dataclass(frozen=True)
class GateMeans:
    """Mean gate of one column on the activations of one split."""

    attribute: str
    site: str
    split: str
    positive: float
    negative: float


def gate_means(activations: Activations, columns: Sequence[Column], splits: Sequence[Split]) -> list[GateMeans]:
    """Per column and split in which both sides of its attribute occur; a linear gate, which is a coordinate of the
    activation, has no state between closed and open to speak of, and one that reads another site is not the attribute's
    own."""
    found = []
    for column in columns:
        if column.gate is Gate.LINEAR or column.reads is not None:
            continue
        values = activations.values[column.site]
        for split in splits:
            rows = [activations.rows(attribute=column.attribute, label=label, split=split) for label in (True, False)]
            if not all(len(side) for side in rows):
                continue
            means = [
                float(
                    gate_values(
                        values[side],
                        column.gate_weight[None],
                        column.vector.new_tensor([column.gate_bias]),
                        gate_codes([column.gate]),
                    ).mean()
                )
                for side in rows
            ]
            found.append(GateMeans(column.attribute, str(column.site), split.value, *means))
    return found
