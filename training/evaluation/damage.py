"""What steering breaks, beside what it gains: fluency, repetition, silence, and text that it should leave alone."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.chat_template import ChatTemplate
from steering.column import Column
from steering.hook import steered
from steering.types import Positions
from training.activations.tokenization import encode_prompt, pad_right
from training.evaluation.generation import Asked, Continuation, Sampling, encoded_prompt, generate
from training.evaluation.kept import NOTHING, Kept
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


def in_short(sampling: Sampling) -> Sampling:
    """How the texts are generated that damage is seen in."""
    return replace(sampling, samples=1, max_new_tokens=min(NEW_TOKENS, sampling.max_new_tokens))


def with_room(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[Asked, str]], sampling: Sampling, chat: ChatTemplate | None
) -> list[tuple[Asked, str]]:
    """Those prompts, each beside its cluster, that leave room for an answer."""
    room = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - sampling.max_new_tokens
    return [one for one in prompts if 0 < len(encoded_prompt(tokenizer, one[0], chat)) <= room]


def damaged(
    model: Any,
    tokenizer: Any,
    arms: Sequence[ArmMeasures],
    prompts: Sequence[tuple[Asked, str]],
    columns: Sequence[Column],
    sampling: Sampling,
    *,
    chat: ChatTemplate | None = None,
    positions: Positions,
    max_rows: int,
    kept: Kept = NOTHING,
    advance: Advance = lambda _: None,
) -> list[ArmMeasures]:
    """The arms with the damage that texts show which are generated to `prompts`, each beside its cluster. `kept` and
    `advance` are as in `generate`; the neutral texts count, too."""
    only = [one.arm for one in arms]
    texts = generate(
        model,
        tokenizer,
        [asked for asked, _ in prompts],
        columns,
        only,
        sampling,
        chat=chat,
        positions=positions,
        max_rows=max_rows,
        kept=kept,
        advance=advance,
    )
    moved = neutral_divergence(model, tokenizer, columns, only, kept=kept, advance=advance)
    return with_damage(arms, texts, [cluster for _, cluster in prompts], moved)


@torch.no_grad()
def neutral_divergence(
    model: Any,
    tokenizer: Any,
    columns: Sequence[Column],
    arms: Sequence[Arm],
    *,
    kept: Kept = NOTHING,
    advance: Advance = lambda _: None,
) -> np.ndarray:
    """KL divergence of each arm's next-token distribution from the unsteered one's, in nats, as a mean over the steered
    tokens of each neutral text: float64 [arms, texts].

    All tokens but the first are steered, as generated ones are. Where an arm has a latched gate, which reads the end of
    a prompt, the first half of a text is the prompt, and steering begins with its last token.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    encoded = [encode_prompt(tokenizer, text)[:limit] for text in TEXTS]
    store = kept.about("neutral", encoded)
    found = {(row["arm"], row["text"]): float(row["kl"]) for row in store.read()}
    strengths = [arm.multipliers(columns) for arm in arms]
    unsteered = [index for index, own in enumerate(strengths) if not any(own)]
    found |= {(index, text): 0.0 for index in unsteered for text in range(len(encoded))}
    advance(len(found))
    size = max(1, _MAX_LOGITS // (model.get_output_embeddings().weight.shape[0] * max(map(len, encoded))))
    for begin in range(0, len(encoded), size):
        part = range(begin, min(begin + size, len(encoded)))
        missing = [index for index in range(len(arms)) if any((index, text) not in found for text in part)]
        if not missing:
            continue
        ids, mask = pad_right([encoded[text] for text in part], model.device)
        plain = _log_shares(model, ids, mask)
        places = torch.arange(mask.shape[1], device=mask.device)
        for index in missing:
            acted = mask * (places >= _first_steered(mask, columns, strengths[index])[:, None])
            repeated = torch.tensor([strengths[index]] * len(part), device=model.device)
            with steered(model, columns, repeated, mask=acted.bool()):
                moved = _log_shares(model, ids, mask)
            each = (plain.exp() * (plain - moved)).sum(-1) * acted
            means = (each.sum(1) / acted.sum(1).clamp_min(1)).clamp_min(0).tolist()
            found |= {(index, text): mean for text, mean in zip(part, means, strict=True)}
            store.add({"arm": index, "text": text, "kl": found[index, text]} for text in part)
            advance(len(part))
    return np.array([[found[index, text] for text in range(len(encoded))] for index in range(len(arms))])


def _first_steered(mask: Tensor, columns: Sequence[Column], strengths: Sequence[float]) -> Tensor:
    """Of each text of a mask [texts, tokens] the place of its first steered token; never an attention sink, which no
    generation steers."""
    used = [column for column, strength in zip(columns, strengths, strict=True) if strength]
    latched = any(column.reads and column.reads.latched for column in used)
    return (mask.sum(1) // 2 - 1).clamp_min(1) if latched else torch.ones_like(mask[:, 0])


def _log_shares(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().log_softmax(-1)
