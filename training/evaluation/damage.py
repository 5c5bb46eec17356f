"""What steering breaks, beside what it gains: fluency, repetition, silence, and text that it should leave alone."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.chat_template import ChatTemplate
from steering.hook import steered
from steering.types import Column, Positions
from training.activations.tokenization import encode_prompt, pad_right
from training.errors import DataError
from training.evaluation.generation import Asked, Continuation, Sampling, encoded_prompt, generate
from training.evaluation.neutral import TEXTS
from training.evaluation.results import DAMAGE, Arm, ArmMeasures, Measured
from training.progress import Advance

NGRAM = 4
NEW_TOKENS = 48
_MAX_LOGITS = 1 << 26


def repetition(tokens: Sequence[int], size: int = NGRAM) -> float:
    """rep-n (Welleck et al., 2019): the share of n-grams that the text has had before; 0 for a text without one."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def perplexity(texts: Sequence[Continuation]) -> float:
    """Of all their tokens, under the unsteered model."""
    tokens = sum(len(text.token_ids) for text in texts)
    return exp(min(700.0, sum(text.nll for text in texts) / max(1, tokens)))


def with_damage(
    arms: Sequence[ArmMeasures],
    texts: Sequence[Continuation],
    clusters: Sequence[str],
    divergences: np.ndarray,
) -> list[ArmMeasures]:
    """The arms with the damage that their texts show (`texts` arm by arm, `clusters` by prompt) and the `divergences`
    [arms, neutral texts] of `neutral_divergence`."""
    size = len(texts) // len(arms)
    found = []
    for index, arm in enumerate(arms):
        own = texts[index * size : (index + 1) * size]
        ids = tuple(clusters[text.prompt] for text in own)
        repeated = [(repetition(text.token_ids), 1.0) for text in own]
        empty = [(float(not text.text.strip()), 1.0) for text in own]
        moved = [(float(value), 1.0) for value in divergences[index]]
        damage = {
            "rep-4": Measured(np.array(repeated), ids),
            "empty": Measured(np.array(empty), ids, rate=True),
            "kl": Measured(np.array(moved), tuple(map(str, range(len(moved))))),
        }
        found.append(
            replace(
                arm,
                damage={name: damage[name] for name in DAMAGE},
                perplexity=perplexity(own),
                surprise=Measured(np.array([(text.nll, float(len(text.token_ids))) for text in own]), ids),
            )
        )
    return found


def damaged(
    model: Any,
    tokenizer: Any,
    arms: Sequence[ArmMeasures],
    prompts: Sequence[Asked],
    clusters: Sequence[str],
    columns: Sequence[Column],
    sampling: Sampling,
    *,
    chat: ChatTemplate | None = None,
    positions: Positions,
    max_rows: int,
) -> list[ArmMeasures]:
    """The arms with the damage that texts show which are generated to `prompts`, once each; those prompts alone that
    leave room for an answer. Raises DataError where none does."""
    sampling = replace(sampling, samples=1, max_new_tokens=min(NEW_TOKENS, sampling.max_new_tokens))
    room = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - sampling.max_new_tokens
    fit = [i for i, p in enumerate(prompts) if 0 < len(encoded_prompt(tokenizer, p, chat)) <= room]
    if not fit:
        raise DataError(f"damage: no prompt leaves room for an answer of {sampling.max_new_tokens} tokens.")
    only = [one.arm for one in arms]
    texts = generate(
        model,
        tokenizer,
        [prompts[i] for i in fit],
        columns,
        only,
        sampling,
        chat=chat,
        positions=positions,
        max_rows=max_rows,
    )
    moved = neutral_divergence(model, tokenizer, columns, only)
    return with_damage(arms, texts, [clusters[i] for i in fit], moved)


@torch.no_grad()
def neutral_divergence(
    model: Any, tokenizer: Any, columns: Sequence[Column], arms: Sequence[Arm], advance: Advance = lambda _: None
) -> np.ndarray:
    """KL divergence of each arm's next-token distribution from the unsteered one's, in nats, as a mean over the tokens
    of each neutral text, all of which but the first are steered as generated ones are: float64 [arms, texts]."""
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    encoded = [encode_prompt(tokenizer, text)[:limit] for text in TEXTS]
    found = np.zeros((len(arms), len(encoded)))
    size = max(1, _MAX_LOGITS // (model.get_output_embeddings().weight.shape[0] * max(map(len, encoded))))
    for begin in range(0, len(encoded), size):
        part = encoded[begin : begin + size]
        ids, mask = pad_right(part, model.device)
        acted = mask.clone()
        acted[:, 0] = 0  # an attention sink, which no generation steers
        plain = _log_shares(model, ids, mask)
        for index, arm in enumerate(arms):
            strengths = arm.multipliers(columns)
            if any(strengths):
                repeated = torch.tensor([strengths] * len(part), device=model.device)
                with steered(model, columns, repeated, mask=acted.bool()):
                    moved = _log_shares(model, ids, mask)
                each = (plain.exp() * (plain - moved)).sum(-1) * acted
                found[index, begin : begin + len(part)] = (
                    (each.sum(1) / acted.sum(1).clamp_min(1)).clamp_min(0).tolist()
                )
            advance(len(part))
    return found


def _log_shares(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().log_softmax(-1)
