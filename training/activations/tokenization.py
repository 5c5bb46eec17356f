"""Tokenised samples and the positions that produce their answer; batches and padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """Tokens of prompt + completion. `start` is the last prompt token, `end` the last token of the text.

    The answer is produced from positions start .. end - 1: the same positions that are steered in a generation.
    """

    ids: tuple[int, ...]
    start: int
    end: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The completion's tokens; target i is predicted at position start + i."""
        return self.ids[self.start + 1 : self.end + 1]

    def clipped(self, limit: int) -> "Encoded":
        """At most `limit` tokens: the beginning of the prompt is dropped, the answer kept."""
        cut = max(0, len(self.ids) - limit)
        return Encoded(self.ids[cut:], max(0, self.start - cut), self.end - cut) if cut else self


def encode(tokenizer: Any, prompt: str, completion: str) -> Encoded:
    """Tokenise the whole text at once, with the special tokens of the tokenizer's own rule.

    A token that holds characters of both belongs to the completion: it is predicted from the token before it.
    """
    text = prompt + completion
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, spans = encoding["input_ids"], encoding["offset_mapping"]
        written = [i for i, (begin, stop) in enumerate(spans) if stop > begin]
        first = next((i for i in written if spans[i][1] > len(prompt)), len(ids))
        last = written[-1] if written else len(ids) - 1
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]
        alone = tokenizer(prompt, verbose=False)["input_ids"] if prompt else []
        first = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
        last = len(ids) - 1
    return Encoded(tuple(ids), max(first - 1, 0), last)


def encode_prompt(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Token ids to continue from: the tokenizer's own special tokens before the text, but none after it."""
    if not getattr(tokenizer, "is_fast", False):
        return tuple(tokenizer(prompt, verbose=False)["input_ids"])
    encoding = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    ids, spans = encoding["input_ids"], encoding["offset_mapping"]
    last = max((i for i, (begin, stop) in enumerate(spans) if stop > begin), default=len(ids) - 1)
    return tuple(ids[: last + 1])


def batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length: at most `max_rows` rows and, padding included, `max_tokens` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) >= max_rows or (len(batch) + 1) * lengths[index] > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest]."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest], pads first."""
    ids, mask = pad_right([row[::-1] for row in rows], pad_id, device)
    return ids.flip(1), mask.flip(1)


def pad_token(tokenizer: Any) -> int:
    """Any valid id does for padding, since padded positions are masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
