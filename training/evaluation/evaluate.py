"""Steered and unsteered side by side: multiple choice by likelihood, and judged generations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from typing import Any

from torch import Tensor

from steering.types import Column, Positions
from training.activations.tokens import encode, pad_token
from training.data.samples import Sample
from training.errors import DataError, TrainingError
from training.evaluation.arms import Arm
from training.evaluation.generation import Continuation, Sampling, generate
from training.evaluation.judges import Judge
from training.evaluation.results import ArmResult, Evaluation
from training.evaluation.scoring import log_likelihoods
from training.evaluation.statistics import Estimate, bootstrap, wilson
from training.progress import progress_bar


@dataclass(frozen=True)
class Question:
    """One prompt with right (True) and wrong completions."""

    attribute: str
    prompt: str
    completions: tuple[str, ...]
    labels: tuple[bool, ...]


def questions(samples: Sequence[Sample]) -> list[Question]:
    """Samples of one attribute, group and prompt make a question, where both labels occur.

    Raises DataError where that is nowhere so.
    """
    together: dict[tuple[str, str, str], dict[str, bool]] = {}
    for sample in samples:
        together.setdefault((sample.attribute, sample.group, sample.prompt), {})[sample.completion] = sample.label
    found = [
        Question(attribute, prompt, tuple(answers), tuple(answers.values()))
        for (attribute, _, prompt), answers in together.items()
        if len(set(answers.values())) == 2
    ]
    if not found:
        raise DataError(
            "No prompt has both a positive and a negative completion, so there is nothing to choose "
            "from; to judge generated answers instead, give --judge and --prompts."
        )
    return found


def evaluate_choices(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    columns: Sequence[Column],
    arms: Sequence[Arm],
    *,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 64,
    progress: bool = False,
) -> Evaluation:
    """For each attribute and arm:

    - `mc1`: how often the likeliest completion is a positive one (total log-likelihood; Wilson interval);
    - `mc1_per_token`: the same by log-likelihood per token;
    - `mc2`: the positives' share of the completions' probabilities (bootstrap interval).
    """
    rows = [encode(tokenizer, question.prompt, text) for question in asked for text in question.completions]
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    rows = [row.clipped(limit) for row in rows]
    results = []
    with progress_bar("score", len(arms) * len(rows), "answers", shown=progress) as advance:
        for arm in arms:
            strengths = arm.multipliers(columns)
            scores = log_likelihoods(
                model,
                rows,
                columns=columns,
                multipliers=[strengths] * len(rows) if any(strengths) else None,
                positions=positions,
                pad_id=pad_token(tokenizer),
                max_rows=max_rows,
            )
            results.append(ArmResult(arm.name, dict(arm.attributes), _choice_metrics(asked, scores)))
            advance(len(rows))
    return Evaluation("choice", tuple(results), {"questions": len(asked), "positions": positions.value})


def evaluate_generations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    judge: Judge,
    columns: Sequence[Column],
    arms: Sequence[Arm],
    sampling: Sampling,
    *,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 128,
    progress: bool = False,
) -> tuple[Evaluation, list[Continuation]]:
    """Generate in every arm and judge: the rate of each metric where it applies, with a Wilson interval, and the
    perplexity of the text under the unsteered model. The texts come along."""
    if not prompts:
        raise DataError("There are no prompts to evaluate.")
    texts = generate(
        model, tokenizer, prompts, columns, arms, sampling, positions=positions, max_rows=max_rows, progress=progress
    )
    results: list[ArmResult] = []
    for index, arm in enumerate(arms):
        size = len(texts) // len(arms)
        own = texts[index * size : (index + 1) * size]
        perplexity = exp(min(700.0, sum(text.nll for text in own) / sum(len(text.token_ids) for text in own)))
        first = results[0].perplexity if results else perplexity
        results.append(
            ArmResult(
                arm.name,
                dict(arm.attributes),
                judged_rates([_verdict(judge, prompts[text.prompt], text.text) for text in own]),
                perplexity,
                perplexity / first if first else None,
            )
        )
    settings = {"prompts": len(prompts), "positions": positions.value, **asdict(sampling)}
    return Evaluation("generation", tuple(results), settings), texts


def judged_rates(verdicts: Sequence[Mapping[str, bool | None]]) -> dict[str, Estimate]:
    """Per metric, how often it holds among the verdicts where it applies."""
    rates = {}
    for name in dict.fromkeys(name for verdict in verdicts for name in verdict):
        values = [bool(v) for verdict in verdicts if (v := verdict.get(name)) is not None]
        rates[name] = wilson(sum(values), len(values))
    return rates


def _verdict(judge: Judge, prompt: str, text: str) -> Mapping[str, bool | None]:
    try:
        return judge(prompt, text)
    except Exception as error:
        raise TrainingError(f"The judge failed on an answer to {prompt[-80:]!r}: {error!r}.") from error


def _choice_metrics(asked: Sequence[Question], scores: Sequence[Tensor]) -> dict[str, Estimate]:
    totals: dict[str, list[tuple[bool, bool, float]]] = {}
    position = 0
    for question in asked:
        own = scores[position : position + len(question.completions)]
        position += len(own)
        sums = [float(s.sum()) for s in own]
        means = [total / max(1, len(s)) for total, s in zip(sums, own, strict=True)]
        shares = [exp(total - max(sums)) for total in sums]
        right = sum(share for share, label in zip(shares, question.labels, strict=True) if label) / sum(shares)
        totals.setdefault(question.attribute, []).append(
            (_likeliest(question, sums), _likeliest(question, means), right)
        )
    metrics = {}
    for attribute, rows in totals.items():
        metrics[f"{attribute} mc1"] = wilson(sum(row[0] for row in rows), len(rows))
        metrics[f"{attribute} mc1_per_token"] = wilson(sum(row[1] for row in rows), len(rows))
        metrics[f"{attribute} mc2"] = bootstrap([row[2] for row in rows])
    return metrics


def _likeliest(question: Question, scores: Sequence[float]) -> bool:
    return question.labels[max(range(len(scores)), key=scores.__getitem__)]
