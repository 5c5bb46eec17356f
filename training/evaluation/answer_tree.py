"""Answers to one prompt as a tree: what several of them begin with is computed once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AnswerTree:
    """Token ids of texts that begin with the same token, each after the one that it follows, whose place is in
    `parents` (-1 for the first). `paths`: the places of each text's tokens."""

    tokens: Tokens
    parents: tuple[int, ...]
    paths: Mapping[Tokens, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        return any(parent != place - 1 for place, parent in enumerate(self.parents))

    @property
    def depths(self) -> list[int]:
        """How many tokens of its text come before each token."""
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + 1 if parent >= 0 else 0)
        return found

    def visible(self) -> Tensor:
        """Bool [tokens, tokens]: which tokens each one attends to, those of its own text up to itself."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                seen[place] |= seen[parent]
        return seen


def answer_trees(texts: Iterable[Tokens], most: int) -> Iterator[AnswerTree]:
    """Trees of at most `most` tokens, or of one text, in which every text is once. The texts begin with the same
    token."""
    own: list[Tokens] = []
    size = 0
    for text in sorted(set(texts)):
        new = len(text) - (shared_length(own[-1], text) if own else 0)  # sorted: no other text has more in common
        if own and size + new > most:
            yield _grown(own)
            own, size, new = [], 0, len(text)
        own.append(text)
        size += new
    if own:
        yield _grown(own)


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if first[place] != second[place]), shorter)


def _grown(texts: Sequence[Tokens]) -> AnswerTree:
    places: dict[tuple[int, int], int] = {}  # (the token before's place, token)
    paths = {}
    for text in texts:
        path: list[int] = []
        for token in text:
            path.append(places.setdefault((path[-1] if path else -1, token), len(places)))
        paths[text] = tuple(path)
    return AnswerTree(tuple(token for _, token in places), tuple(parent for parent, _ in places), paths)


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """What a model is given of trees that go on from cached tokens: ids and places in the text, int64 [trees, largest],
    and the mask, int64 [trees, cached + largest], or where a tree branches, additive [trees, 1, largest, cached +
    largest]."""

    ids: Tensor
    at: Tensor
    mask: Tensor

    def __getitem__(self, rows: Sequence[int]) -> "TreeBatch":
        index = torch.tensor(rows, device=self.ids.device)
        return TreeBatch(self.ids[index], self.at[index], self.mask[index])


def tree_batch(trees: Sequence[AnswerTree], cached: int, device: torch.device, dtype: torch.dtype) -> TreeBatch:
    """A tree is filled up with its last token: the padding is masked, but a masked position is still computed, and a
    pad token may have no embedding, or one that is not finite."""
    width = max(map(len, trees))
    spare = [width - len(tree) for tree in trees]
    ids = torch.tensor([tree.tokens + tree.tokens[-1:] * pads for tree, pads in zip(trees, spare, strict=True)])
    depths = [tree.depths for tree in trees]
    at = cached + torch.tensor([own + own[-1:] * pads for own, pads in zip(depths, spare, strict=True)])
    if any(tree.branches for tree in trees):
        seen = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
        for place, tree in enumerate(trees):
            seen[place, : len(tree), : len(tree)] = tree.visible()
        mask = torch.zeros(len(trees), 1, width, cached + width, dtype=dtype)
        mask[:, 0, :, cached:].masked_fill_(~seen, torch.finfo(dtype).min)
    else:
        mask = torch.tensor([[1] * (cached + len(tree)) + [0] * pads for tree, pads in zip(trees, spare, strict=True)])
    return TreeBatch(ids.to(device), at.to(device), mask.to(device))
