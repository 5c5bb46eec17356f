"""Log-likelihood of given answers, steered as a generation of the same answer would be."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from steering.hook import steered
from steering.types import Column, Positions
from training.activations.tokens import Encoded, batches, pad_right

_MAX_LOGITS = 1 << 26


@torch.no_grad()
def log_likelihoods(
    model: Any,
    rows: Sequence[Encoded],
    *,
    columns: Sequence[Column] = (),
    multipliers: Sequence[Sequence[float]] | None = None,
    positions: Positions = Positions.GENERATED,
    pad_id: int = 0,
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
        ids, mask = pad_right([row.ids for row in part], pad_id, model.device)
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
