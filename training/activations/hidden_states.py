"""Hidden states of a Hugging Face model at chosen sites and positions: one forward pass, left after the last site.

Samples that share a prompt, as the answers to one question do, share its prefill: the prompt's keys and values are
computed once, without its last token, whose hidden states count for every sample by itself. Prompts of one length run
together: without padding before the answers, nothing has to be known of how a model treats it.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from steering.sites import site_module, text_config
from steering.types import Site
from training.activations import SINK, Pool
from training.activations.tokenization import Encoded, batches, pad_right

Pooling = Callable[[Tensor], Tensor]

_WORTH_SHARING = 0.8  # of the tokens that the samples have
_MAX_PADDING, _SMALL_BATCH = 0.1, 256  # of a batch's tokens; tokens


def span(row: Encoded, pool: Pool) -> range:
    """The positions of a sample that count."""
    if pool is Pool.LAST:
        return range(row.end, row.end + 1)
    if pool is Pool.FIRST:
        return range(row.start, row.start + 1)
    return range(row.start, max(row.end, row.start + 1))


@dataclass(frozen=True, eq=False)
class PooledPositions:
    """The positions of a batch of B samples that count. Samples with fewer than W of them have repetitions, which
    `counts` leaves out."""

    index: Tensor  # int64 [B, W]
    counts: Tensor  # bool [B, W]
    pool: Pool

    @classmethod
    def of(cls, rows: Sequence[Encoded], pool: Pool, device: torch.device) -> Self:
        spans = [span(row, pool) for row in rows]
        width = max(map(len, spans))
        index = [[*own, *[own[-1]] * (width - len(own))] for own in spans]
        counts = [[place < len(own) for place in range(width)] for own in spans]
        return cls(torch.tensor(index, device=device), torch.tensor(counts, device=device), pool)

    def take(self, hidden: Tensor) -> Tensor:
        """States [B, time, D] of any dtype -> float32 rows [N, D]: one a sample, or with `Pool.TOKENS` one a position.
        No other position is converted or copied. A mean is over the positions that are no sinks: those with at most
        `SINK` times the median norm of the sample's positions."""
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        states = hidden[rows, self.index].float()
        if self.pool is Pool.TOKENS:
            return states[self.counts]
        norms = states.norm(dim=-1).masked_fill(~self.counts, torch.nan)
        kept = self.counts & (norms <= SINK * norms.nanmedian(1, keepdim=True).values)
        return torch.einsum("bwd,bw->bd", states, kept / kept.sum(1, keepdim=True))


@torch.no_grad()
def read_hidden_states(
    model: Any, sites: Sequence[Site], take: Pooling, *, input_ids: Tensor, **inputs: Any
) -> dict[Site, Tensor]:
    """`take` of the hidden states [batch, time, D] at each site, applied as soon as they are there, so that the whole
    states of one site do not wait for another's. `input_ids` [batch, time]; more `inputs` as the model takes them."""

    def shaped(hidden: Tensor) -> Tensor:
        return take(hidden.reshape(*input_ids.shape, -1))

    with _hooks(model, sites, shaped) as seen, suppress(_AllSitesRead):
        model(input_ids=input_ids, **inputs)
    return {site: seen[site] for site in sites}


class _AllSitesRead(Exception):
    """Every site was read: the rest of the forward pass is not needed."""


@contextmanager
def _hooks(model: nn.Module, sites: Sequence[Site], take: Pooling) -> Iterator[dict[Site, Tensor]]:
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> None:
        seen[site] = take(value[0] if isinstance(value, tuple) else value)
        if len(seen) == len(set(sites)):
            raise _AllSitesRead

    def reader(site: Site, end: str) -> Callable[..., None]:
        def read_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            keep(site, args)

        def read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(site, output)

        return read_input if end == "input" else read_output

    handles = []
    try:
        for site in dict.fromkeys(sites):
            module, end = site_module(model, site)
            register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
            handles.append(register(reader(site, end)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def worth_sharing(model: Any, rows: Sequence[Encoded]) -> bool:
    """Whether that saves enough tokens, and the model can go on from stored keys and values."""
    prompts = {row.ids[: row.start] for row in rows}
    left = sum(map(len, prompts)) + sum(len(row.ids) - row.start for row in rows)
    return left <= _WORTH_SHARING * sum(len(row.ids) for row in rows) and _can_share(model)


def shared_states(
    model: Any,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    pool: Pool,
    *,
    max_rows: int,
    max_tokens: int,
) -> Iterator[tuple[list[int], dict[Site, Tensor]]]:
    """Batches of `rows`, by their indices, with what `pool` takes of their states at each site."""
    for group in _prompt_groups(rows, max_rows, max_tokens):
        ids = torch.tensor([rows[members[0]].ids[: rows[members[0]].start] for members in group], device=model.device)
        cache = _prefill(model, sites, ids)
        owner = [(place, index) for place, members in enumerate(group) for index in members]
        answers = [_without_prompt(rows[index]) for _, index in owner]
        lengths = [ids.shape[1] + len(answer.ids) for answer in answers]
        for batch in _tight_batches(batches(lengths, max_rows=max_rows, max_tokens=max_tokens), answers):
            places = torch.tensor([owner[i][0] for i in batch], device=model.device)
            part = [answers[i] for i in batch]
            tokens, mask = pad_right([answer.ids for answer in part], model.device)
            states = read_hidden_states(
                model,
                sites,
                PooledPositions.of(part, pool, model.device).take,
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


def _prompt_groups(rows: Sequence[Encoded], max_rows: int, max_tokens: int) -> Iterator[list[list[int]]]:
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


def _tight_batches(found: Iterable[list[int]], answers: Sequence[Encoded]) -> Iterator[list[int]]:
    """Batches, shortest answer first, in parts with little padding: answers to the same prompts differ in length."""
    for batch in found:
        part: list[int] = []
        tokens = 0
        for index in batch:
            length = len(answers[index].ids)
            if tokens >= _SMALL_BATCH and len(part) * length > (1 + _MAX_PADDING) * tokens:
                yield part
                part, tokens = [], 0
            part.append(index)
            tokens += length
        yield part


def _prefill(model: Any, sites: Sequence[Site], ids: Tensor) -> DynamicCache:
    """Keys and values up to the last site."""
    cache = DynamicCache(config=text_config(model))
    if ids.shape[1]:
        read_hidden_states(
            model, sites, lambda hidden: hidden[:, :0], input_ids=ids, past_key_values=cache, use_cache=True
        )
    return cache


def _selected(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """The cache of these rows; the given one stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _without_prompt(row: Encoded) -> Encoded:
    """What comes after the shared part."""
    return Encoded(row.ids[row.start :], 0, row.end - row.start)
