"""Multiple choice by likelihood: log-probabilities of given answers, steered as a generation of them would be."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor

from steering.chat_template import ChatTemplate
from steering.hook import steered
from steering.types import Column, Positions
from training.activations.tokenization import Encoded, batches, check_ids, encode, pad_right
from training.data.samples import Form, Sample, Turn
from training.errors import DataError
from training.evaluation.results import Arm, ArmResult, Estimate, Evaluation, bootstrap, wilson
from training.progress import progress_bar

_MAX_LOGITS = 1 << 26


@torch.no_grad()
def log_likelihoods(
    model: Any,
    rows: Sequence[Encoded],
    *,
    columns: Sequence[Column] = (),
    multipliers: Sequence[Sequence[float]] | None = None,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 64,
    max_tokens: int = 8192,
) -> list[Tensor]:
    """Log-probability of every answer token: for each row, float32 [answer tokens] on the CPU.

    `multipliers` [rows, columns]; None leaves the model unsteered. With `generated` positions the prompt's last token
    and the answer's tokens are steered.
    """
    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    budget = max(1, min(max_tokens, _MAX_LOGITS // vocabulary))
    for batch in batches([len(row.ids) for row in rows], max_rows=max_rows, max_tokens=budget):
        part = [rows[index] for index in batch]
        ids, mask = pad_right([row.ids for row in part], model.device)
        context: Any = nullcontext()
        if columns and multipliers is not None:
            strengths = torch.tensor([list(multipliers[index]) for index in batch], device=model.device)
            context = steered(model, columns, strengths, mask=steered_mask(part, positions).to(model.device))
        skipped = min(row.start for row in part)
        with context:
            logits = _tail_logits(model, ids, mask, ids.shape[1] - skipped)
        for index, row, values in zip(batch, part, logits, strict=True):
            targets = torch.tensor(row.targets, device=values.device)
            answer = values[row.start - skipped : row.end - skipped].float().log_softmax(-1)
            scores[index] = answer.gather(1, targets[:, None])[:, 0].cpu()
    return scores


def steered_mask(rows: Sequence[Encoded], positions: Positions) -> Tensor:
    """Bool [rows, longest]: the tokens of prompt + answer that are steered."""
    mask = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.bool)
    for index, row in enumerate(rows):
        first = row.start if positions is Positions.GENERATED else 0
        last = row.start if positions is Positions.PROMPT else row.end
        mask[index, first : last + 1] = True
    return mask


def _tail_logits(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Logits [batch, count, vocabulary] of the last `count` positions."""
    limit = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **limit).logits
    return logits[:, -count:]


@dataclass(frozen=True)
class Question:
    """One prompt with right (True) and wrong completions."""

    attribute: str
    prompt: str
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    turns: tuple[Turn, ...] = ()
    """Of a conversation, in place of the prompt."""


def questions(samples: Sequence[Sample]) -> list[Question]:
    """Samples of one attribute, group and prompt make a question, where both labels occur.

    Raises DataError where that is nowhere so.
    """
    together: dict[tuple[str, str, str, tuple[Turn, ...]], dict[str, bool]] = {}
    for sample in samples:
        key = (sample.attribute, sample.group, sample.prompt, sample.turns)
        together.setdefault(key, {})[sample.completion] = sample.label
    found = [
        Question(attribute, prompt, tuple(answers), tuple(answers.values()), turns)
        for (attribute, _, prompt, turns), answers in together.items()
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
    chat: ChatTemplate | None = None,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 64,
    progress: bool = False,
) -> Evaluation:
    """For each attribute and arm:

    - `mc1`: how often the likeliest completion is a positive one (total log-likelihood; Wilson interval);
    - `mc1_per_token`: the same by log-likelihood per token;
    - `mc2`: the positives' share of the completions' probabilities (bootstrap interval).
    """
    rows = [
        encode(tokenizer, question.prompt, text, question.turns, chat)
        for question in asked
        for text in question.completions
    ]
    check_ids(model, tokenizer, (row.ids for row in rows))
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
                max_rows=max_rows,
            )
            results.append(ArmResult(arm.name, dict(arm.attributes), _choice_metrics(asked, scores)))
            advance(len(rows))
    form = Form.CHAT if any(question.turns for question in asked) else Form.PLAIN
    settings = {"questions": len(asked), "form": form.value, "positions": positions.value}
    return Evaluation("choice", tuple(results), settings)


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
