"""Tokenised samples and the positions that produce their answer; batches and padding."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering.chat_template import ChatTemplate
from steering.errors import TextError
from steering.text import check_characters, tokenize, tokenize_pair
from training.data.samples import Turn
from training.errors import DataError


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


def encode(
    tokenizer: Any, prompt: str, completion: str, turns: Sequence[Turn] = (), chat: ChatTemplate | None = None
) -> Encoded:
    """Tokenise the whole text at once, with the special tokens of the tokenizer's own rule. `turns` stand in place of
    the prompt as `chat` renders them, with the special tokens that it writes.

    A token that holds characters of both belongs to the completion: it is predicted from the token before it. Raises
    DataError for turns that cannot be rendered, and for half of a surrogate pair.
    """
    prompt = _rendered(chat, turns) if turns else prompt
    _check(prompt + completion)
    before, after = tokenize_pair(tokenizer, prompt, completion, add_special_tokens=False if turns else None)
    ids = (*before, *after)
    return Encoded(ids, max(len(before) - 1, 0), len(ids) - 1)


def encode_prompt(
    tokenizer: Any, prompt: str, turns: Sequence[Turn] = (), chat: ChatTemplate | None = None
) -> tuple[int, ...]:
    """Token ids to continue from: the tokenizer's own special tokens before the text, but none after it; `turns` as in
    `encode`. Raises DataError as it does."""
    prompt = _rendered(chat, turns) if turns else prompt
    _check(prompt)
    return tokenize(tokenizer, prompt, add_special_tokens=False if turns else None).ids


def _rendered(chat: ChatTemplate | None, turns: Sequence[Turn]) -> str:
    with _named(turns[-1].content):
        if chat is None:
            raise TextError("the model's tokenizer has no chat template; --chat-template FILE gives it one")
        return chat.render([turn._asdict() for turn in turns])


def _check(text: str) -> None:
    with _named(text):
        check_characters(text)


@contextmanager
def _named(text: str) -> Iterator[None]:
    """A TextError inside becomes a DataError that quotes the text."""
    try:
        yield
    except TextError as error:
        raise DataError(f"The text {text[:80]!r} cannot be read by the model: {error}.") from None


def check_ids(model: Any, tokenizer: Any, rows: Iterable[Sequence[int]]) -> None:
    """Raises DataError for a token without an embedding, such as one that was added to the tokenizer alone."""
    count = model.get_input_embeddings().weight.shape[0]
    for ids in rows:
        if (token := max(ids, default=0)) >= count:
            raise DataError(
                f"The text {tokenizer.decode(ids)[:80]!r} holds {tokenizer.convert_ids_to_tokens(token)!r}, which is "
                f"token {token}, and the model has embeddings for the tokens below {count} alone."
            )


def batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int, few: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length: at most `max_rows` rows and, padding included, `max_tokens` tokens; of a
    batch of more than `few` tokens an eighth is padding at most."""
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        size = (len(batch) + 1) * lengths[index]
        padding = size - tokens - lengths[index]
        wasteful = few is not None and size > few and 8 * padding > size
        if batch and (len(batch) >= max_rows or size > max_tokens or wasteful):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest].

    A row is filled up with its own last token: the padding is masked, but a masked position is still computed, and a
    pad token may have no embedding, or one that is not finite.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *list(row[-1:]) * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def pad_left(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [rows, longest], a row's padding, its own first token, in front."""
    ids, mask = pad_right([row[::-1] for row in rows], device)
    return ids.flip(1), mask.flip(1)
