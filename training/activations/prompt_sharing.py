"""Samples that share a prompt, as the answers to one question do: the prompt's keys and values are computed once.

What is shared is the prompt without its last token, whose hidden states count for every sample by itself. Prompts of
one length run together: without padding before the answers, nothing has to be known of how a model treats it.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from steering.sites import text_config
from steering.types import Site
from training.activations.hidden_states import Wanted, read
from training.activations.tokens import Encoded, batches, pad_right
from training.choices import Pool

_WORTH = 0.8  # of the tokens that the samples have
_PADDING, _SMALL = 0.1, 256  # of a batch's tokens; tokens


def worth_sharing(model: Any, rows: Sequence[Encoded]) -> bool:
    """Whether that saves enough tokens, and the model can go on from stored keys and values."""
    prompts = {row.ids[: row.start] for row in rows}
    left = sum(map(len, prompts)) + sum(len(row.ids) - row.start for row in rows)
    return left <= _WORTH * sum(len(row.ids) for row in rows) and _can_share(model)


def shared_states(
    model: Any,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    pool: Pool,
    pad_id: int,
    *,
    max_rows: int,
    max_tokens: int,
) -> Iterator[tuple[list[int], dict[Site, Tensor]]]:
    """Batches of `rows`, by their indices, with what `pool` takes of their states at each site."""
    for group in _groups(rows, max_rows, max_tokens):
        ids = torch.tensor([rows[members[0]].ids[: rows[members[0]].start] for members in group], device=model.device)
        cache = _prefill(model, sites, ids)
        owner = [(place, index) for place, members in enumerate(group) for index in members]
        answers = [_answer(rows[index]) for _, index in owner]
        lengths = [ids.shape[1] + len(answer.ids) for answer in answers]
        for batch in _tight(batches(lengths, max_rows=max_rows, max_tokens=max_tokens), answers):
            places = torch.tensor([owner[i][0] for i in batch], device=model.device)
            part = [answers[i] for i in batch]
            tokens, mask = pad_right([answer.ids for answer in part], pad_id, model.device)
            states = read(
                model,
                sites,
                Wanted.of(part, pool, model.device).take,
                input_ids=tokens,
                attention_mask=torch.cat([torch.ones_like(ids)[places], mask], 1),
                past_key_values=_selected(cache, places),
                use_cache=True,
            )
            yield [owner[i][1] for i in batch], states


def _can_share(model: Any) -> bool:
    """Attention alone, and no positions whose meaning depends on the length of the text."""
    config = text_config(model)
    takes = inspect.signature(model.forward).parameters
    layers = DynamicCache(config=config).layers if "past_key_values" in takes else []
    scaled = str(getattr(config, "rope_parameters", None))
    return (
        bool(layers)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        and not ("dynamic" in scaled or "longrope" in scaled)
    )


def _groups(rows: Sequence[Encoded], max_rows: int, max_tokens: int) -> Iterator[list[list[int]]]:
    """The rows of each prompt, in groups of prompts of one length that fit into a batch."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(row.ids[: row.start], []).append(index)
    by_length: dict[int, list[list[int]]] = {}
    for prompt, members in by_prompt.items():
        by_length.setdefault(len(prompt), []).append(members)
    for length, prompts in by_length.items():
        for batch in batches([length] * len(prompts), max_rows=max_rows, max_tokens=max_tokens):
            yield [prompts[i] for i in batch]


def _tight(found: Iterable[list[int]], answers: Sequence[Encoded]) -> Iterator[list[int]]:
    """Batches, shortest answer first, in parts with little padding: answers to the same prompts differ in length."""
    for batch in found:
        part: list[int] = []
        tokens = 0
        for index in batch:
            length = len(answers[index].ids)
            if tokens >= _SMALL and len(part) * length > (1 + _PADDING) * tokens:
                yield part
                part, tokens = [], 0
            part.append(index)
            tokens += length
        yield part


def _prefill(model: Any, sites: Sequence[Site], ids: Tensor) -> DynamicCache:
    """Keys and values up to the last site."""
    cache = DynamicCache(config=text_config(model))
    if ids.shape[1]:
        read(model, sites, lambda hidden: hidden[:, :0], input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """The cache of these rows; the given one stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _answer(row: Encoded) -> Encoded:
    """What comes after the shared part."""
    return Encoded(row.ids[row.start :], 0, row.end - row.start)
