"""Log-probabilities of given answers, steered as a generation of them would be, each prompt read once."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.hook import steered
from steering.types import Column, Positions
from training.activations.tokenization import Encoded, batches, pad_right
from training.progress import Advance

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
    advance: Advance = lambda _: None,
) -> list[Tensor]:
    """Log-probability of every answer token: for each row, float32 [answer tokens] on the CPU.

    `multipliers` [rows, columns]; None leaves the model unsteered. With `generated` positions the prompt's last token
    and the answer's tokens are steered, and all rows of one prompt go on from the same keys and values; with the other
    positions those that are also steered alike. `advance` is told how many rows have been scored.
    """
    steering = multipliers if columns and multipliers is not None else None
    scorer = _Scorer(model, columns, positions, max_rows, max_tokens)
    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    for prefixes, lead in scorer.read(rows, steering):
        for part, found in scorer.score(rows, steering, prefixes, lead):
            for index, values in zip(part, found, strict=True):
                scores[index] = values
            advance(len(part))
    return scores


def steered_mask(rows: Sequence[Encoded], positions: Positions) -> Tensor:
    """Bool [rows, longest]: the tokens of prompt + answer that are steered."""
    mask = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.bool)
    for index, row in enumerate(rows):
        first = row.start if positions is Positions.GENERATED else 0
        last = row.start if positions is Positions.PROMPT else row.end
        mask[index, first : last + 1] = True
    return mask


@dataclass(frozen=True)
class _Prefix:
    """All of a prompt but its last token, how it is steered, and the rows that go on from it."""

    ids: tuple[int, ...]
    strengths: tuple[float, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Scorer:
    model: Any
    columns: Sequence[Column]
    positions: Positions
    max_rows: int
    max_tokens: int

    def read(
        self, rows: Sequence[Encoded], steering: Sequence[Sequence[float]] | None
    ) -> Iterator[tuple[list[_Prefix], Any]]:
        """Prefixes of one length together, so that none is padded, with their keys and values; what all of them begin
        with is read once."""
        together: dict[tuple[tuple[int, ...], tuple[float, ...]], list[int]] = defaultdict(list)
        shared = self.positions is Positions.GENERATED or steering is None
        for index, row in enumerate(rows):
            strengths = () if shared or steering is None else tuple(steering[index])
            together[row.ids[: row.start], strengths].append(index)
        prefixes = [_Prefix(ids, strengths, tuple(own)) for (ids, strengths), own in together.items()]
        lead = _common([prefix.ids for prefix in prefixes]) if shared and len(prefixes) > 1 else ()
        begun = self._forward_cached([lead], None, None) if lead else None
        for length in sorted({len(prefix.ids) for prefix in prefixes}):
            own = [prefix for prefix in prefixes if len(prefix.ids) == length]
            size = max(1, min(self.max_rows, self.max_tokens // max(1, length)))
            for begin in range(0, len(own), size):
                part = own[begin : begin + size]
                cache = _selected(begun, [0] * len(part)) if begun is not None else None
                if length > len(lead):
                    alike = None if shared else [prefix.strengths for prefix in part]
                    cache = self._forward_cached([prefix.ids[len(lead) :] for prefix in part], cache, alike)
                yield part, cache

    def score(
        self,
        rows: Sequence[Encoded],
        steering: Sequence[Sequence[float]] | None,
        prefixes: Sequence[_Prefix],
        cache: Any,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Rows of these prefixes, in batches, and their answers' log-probabilities."""
        members = [(place, index) for place, prefix in enumerate(prefixes) for index in prefix.rows]
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        before = len(prefixes[0].ids)
        budget = max(1, min(self.max_tokens, _MAX_LOGITS // vocabulary))
        most = max(1, min(self.max_rows, self.max_tokens // (before + 1)))
        tails = [len(rows[index].ids) - before for _, index in members]
        for batch in batches(tails, max_rows=most, max_tokens=budget):
            part = [members[number] for number in batch]
            own = [rows[index] for _, index in part]
            ids, mask = pad_right([row.ids[before:] for row in own], self.model.device)
            context: Any = nullcontext()
            if steering is not None and any(any(steering[index]) for _, index in part):
                strengths = torch.tensor([list(steering[index]) for _, index in part], device=self.model.device)
                acted = steered_mask(own, self.positions)
                context = steered(self.model, self.columns, strengths, mask=acted)
            with context:
                logits = self._logits(ids, mask, _selected(cache, [place for place, _ in part]), before)
            yield (
                [index for _, index in part],
                [_gathered(values, row, before) for values, row in zip(logits, own, strict=True)],
            )

    def _forward_cached(
        self, ids: Sequence[tuple[int, ...]], cache: Any, strengths: Sequence[Sequence[float]] | None
    ) -> Any:
        """The keys and values after these tokens, all rows of one length, which go on from `cache`."""
        tokens = torch.tensor(ids, device=self.model.device)
        before = 0 if cache is None else cache.get_seq_length()
        context: Any = nullcontext()
        if strengths is not None and any(map(any, strengths)):
            acted = torch.ones(len(tokens), before + tokens.shape[1], dtype=torch.bool)
            multipliers = torch.tensor([list(row) for row in strengths], device=self.model.device)
            context = steered(self.model, self.columns, multipliers, mask=acted)
        at = torch.arange(before, before + tokens.shape[1], device=tokens.device).expand_as(tokens)
        with context:
            return self.model(
                input_ids=tokens, position_ids=at, past_key_values=cache, use_cache=True, **_kept(self.model, 1)
            ).past_key_values

    def _logits(self, ids: Tensor, mask: Tensor, cache: Any, before: int) -> Tensor:
        """Logits [rows, tokens, vocabulary] of what goes on from `cache`."""
        if cache is None:
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits
        whole = torch.cat([mask.new_ones(len(mask), before), mask], dim=1)
        at = torch.arange(before, before + ids.shape[1], device=ids.device).expand_as(ids)
        continued: Tensor = self.model(
            input_ids=ids, attention_mask=whole, position_ids=at, past_key_values=cache, use_cache=True
        ).logits
        return continued


def _gathered(logits: Tensor, row: Encoded, before: int) -> Tensor:
    """Of one row's logits [tokens, vocabulary] from position `before` on: its answer's log-probabilities."""
    answer = logits[row.start - before : row.end - before].float()
    targets = torch.tensor(row.targets, dtype=torch.int64, device=logits.device)
    return (answer.gather(1, targets[:, None])[:, 0] - answer.logsumexp(-1)).cpu()


def _selected(cache: Any, places: Sequence[int]) -> Any:
    """A cache of these rows of `cache`, which stays as it is."""
    if cache is None:
        return None
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(torch.tensor(places))
    return found


def _common(texts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    count = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return tuple(first[:count])


def _kept(model: Any, count: int) -> dict[str, int]:
    """How many positions' logits a forward pass computes, where the model can be told."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
