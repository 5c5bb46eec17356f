"""Log-probabilities of given answers, steered as a generation of them would be. What answers and arms have in common
is computed once: a prompt, what answers of a prompt begin with, and the blocks before the first steered site."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steering.column import Column
from steering.errors import SteeringError
from steering.hook import steered
from steering.sites import text_config
from steering.types import Positions
from training.activations.tokenization import Encoded, batches
from training.evaluation.answer_tree import AnswerTree, Tokens, TreeBatch, answer_trees, shared_length, tree_batch
from training.evaluation.partial_pass import first_part, last_alike, second_part
from training.progress import Advance

_MAX_LOGITS = 1 << 26
_MAX_TREE = 256  # tokens: attention is over all of them
_FEW = 512  # tokens: so few may be padded to the longest, many by an eighth at most


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
    last = last_alike(columns, steering) if steering is not None else -1
    wanted = _Shared(_have_beginnings(rows), last)
    return replace(scorer, shared=_trusted(model, wanted)).scores(rows, steering, advance)


def steered_mask(rows: Sequence[Encoded], positions: Positions) -> Tensor:
    """Bool [rows, longest]: the tokens of prompt + answer that are steered."""
    mask = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.bool)
    for index, row in enumerate(rows):
        first = row.start if positions is Positions.GENERATED else 0
        last = row.start if positions is Positions.PROMPT else row.end
        mask[index, first : last + 1] = True
    return mask


@dataclass(frozen=True)
class _Shared:
    """What is computed once: the beginnings of a prompt's answers, and the blocks up to `last` for all arms (-1: none).
    Both need more of a model than that it can be called."""

    beginnings: bool = False
    last: int = -1


@dataclass(frozen=True)
class _Prefix:
    """All of a prompt but its last token, how it is steered, and the rows that go on from it."""

    ids: Tokens
    strengths: tuple[float, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Job:
    """A tree of answers under one steering: the place of its prefix, and the rows that it scores."""

    prefix: int
    tree: AnswerTree
    strengths: tuple[float, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Scorer:
    model: Any
    columns: Sequence[Column]
    positions: Positions
    max_rows: int
    max_tokens: int
    shared: _Shared = _Shared()

    def scores(
        self, rows: Sequence[Encoded], steering: Sequence[Sequence[float]] | None, advance: Advance = lambda _: None
    ) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for prefixes, lead in self.read(rows, steering):
            for part, values in self.score(rows, steering, prefixes, lead):
                for index, own in zip(part, values, strict=True):
                    found[index] = own
                advance(len(part))
        return found

    def read(
        self, rows: Sequence[Encoded], steering: Sequence[Sequence[float]] | None
    ) -> Iterator[tuple[list[_Prefix], Any]]:
        """Prefixes of one length together, so that none is padded, with their keys and values; what all of them begin
        with is read once."""
        together: dict[tuple[Tokens, tuple[float, ...]], list[int]] = defaultdict(list)
        alike = self.positions is Positions.GENERATED or steering is None
        for index, row in enumerate(rows):
            strengths = () if alike or steering is None else tuple(steering[index])
            together[row.ids[: row.start], strengths].append(index)
        prefixes = [_Prefix(ids, strengths, tuple(own)) for (ids, strengths), own in together.items()]
        lead = _common([prefix.ids for prefix in prefixes]) if alike and len(prefixes) > 1 else ()
        begun = self._forward_cached([lead], None, None) if lead else None
        for length in sorted({len(prefix.ids) for prefix in prefixes}):
            own = [prefix for prefix in prefixes if len(prefix.ids) == length]
            size = max(1, min(self.max_rows, self.max_tokens // max(1, length)))
            for begin in range(0, len(own), size):
                part = own[begin : begin + size]
                cache = _selected(begun, [0] * len(part)) if begun is not None else None
                if length > len(lead):
                    each = None if alike else [prefix.strengths for prefix in part]
                    cache = self._forward_cached([prefix.ids[len(lead) :] for prefix in part], cache, each)
                yield part, cache

    def score(
        self,
        rows: Sequence[Encoded],
        steering: Sequence[Sequence[float]] | None,
        prefixes: Sequence[_Prefix],
        cache: Any,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Rows of these prefixes, in batches, and their answers' log-probabilities."""
        jobs = list(self._jobs(rows, steering, prefixes))
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        before = len(prefixes[0].ids)
        budget = max(1, min(self.max_tokens, _MAX_LOGITS // vocabulary))
        most = max(1, min(self.max_rows, self.max_tokens // (before + 1)))
        for batch in batches([len(job.tree) for job in jobs], max_rows=most, max_tokens=budget, few=_FEW):
            part = [jobs[number] for number in batch]
            logits = self._logits(part, cache, before)
            scored = [(place, job, index) for place, job in enumerate(part) for index in job.rows]
            where = [
                (place, at, target)
                for place, job, index in scored
                for at, target in zip(job.tree.paths[_read(rows[index])], rows[index].targets, strict=False)
            ]
            values = torch.split(_gathered(logits, where), [len(rows[index].targets) for _, _, index in scored])
            yield [index for _, _, index in scored], list(values)

    def _jobs(
        self, rows: Sequence[Encoded], steering: Sequence[Sequence[float]] | None, prefixes: Sequence[_Prefix]
    ) -> Iterator[_Job]:
        reach = _reach(self.model)
        longest = max(rows[index].end for prefix in prefixes for index in prefix.rows)  # a batch has one kind of mask
        for place, prefix in enumerate(prefixes):
            together: dict[tuple[int, tuple[float, ...]], list[int]] = defaultdict(list)
            for index in prefix.rows:
                strengths = tuple(steering[index]) if steering is not None else ()
                together[rows[index].ids[rows[index].start], strengths].append(index)
            # By places, too: later branches of a tree are farther from the prompt than in their text.
            size = min(_MAX_TREE, reach - len(prefix.ids)) if self.shared.beginnings and longest <= reach else 0
            known: dict[frozenset[Tokens], list[AnswerTree]] = {}  # the same tree in every arm
            for (_, strengths), own in together.items():
                texts = frozenset(_read(rows[index]) for index in own)
                if texts not in known:
                    known[texts] = list(answer_trees(texts, size))
                for tree in known[texts]:
                    members = tuple(index for index in own if _read(rows[index]) in tree.paths)
                    yield _Job(place, tree, strengths, members)

    def _logits(self, jobs: Sequence[_Job], cache: Any, before: int) -> Tensor:
        """Logits [jobs, tokens, vocabulary] of what goes on from the cached tokens of the jobs' prefixes."""
        trees = list(dict.fromkeys(job.tree for job in jobs))
        places = [trees.index(job.tree) for job in jobs]
        prefixes = [job.prefix for job in jobs]
        batch = tree_batch(trees, before, self.model.device, self.model.dtype)
        if self.shared.last < 0 or len(trees) == len(jobs):
            with self._steered(jobs, before, batch.ids.shape[1]):
                return self._forward(batch[places], _selected(cache, prefixes))
        own, split = [prefixes[places.index(place)] for place in range(len(trees))], self.shared.last + 1
        common = first_part(
            self.model,
            self.shared.last,
            lambda: self._forward(batch, _selected(cache, own, slice(0, split)), **_kept(self.model, 1)),
        )
        with self._steered(jobs, before, batch.ids.shape[1]), second_part(self.model, split - 1, common, places):
            return self._forward(batch[places], _selected(cache, prefixes, slice(split, None)))

    def _steered(self, jobs: Sequence[_Job], before: int, width: int) -> Any:
        if not self.columns or not any(any(job.strengths) for job in jobs):
            return nullcontext()
        acted = torch.zeros(len(jobs), before + width, dtype=torch.bool)
        acted[:, :before] = self.positions is not Positions.GENERATED
        for place, job in enumerate(jobs):
            acted[place, before : before + (1 if self.positions is Positions.PROMPT else len(job.tree))] = True
        strengths = torch.tensor([job.strengths for job in jobs], device=self.model.device)
        return steered(self.model, self.columns, strengths, mask=acted)

    def _forward(self, batch: TreeBatch, cache: Any, **kept: int) -> Tensor:
        logits: Tensor = self.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.at,
            past_key_values=cache,
            use_cache=cache is not None,
            **kept,
        ).logits
        return logits

    def _forward_cached(self, ids: Sequence[Tokens], cache: Any, strengths: Sequence[Sequence[float]] | None) -> Any:
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


_TRIED: WeakKeyDictionary[Any, dict[tuple[_Shared, Any], bool]] = WeakKeyDictionary()
_TRIAL = ((1, 2, 3, 4, 5, 6, 2), (1, 2, 3, 4, 7, 1), (1, 2, 3, 8, 9, 5, 4))


def _trusted(model: Any, wanted: _Shared) -> _Shared:
    """As much of what is wanted as this model gets right."""
    beginnings = wanted.beginnings and _is_right(model, _Shared(beginnings=True))
    return _Shared(beginnings, wanted.last if _is_right(model, _Shared(last=wanted.last)) else -1)


def _is_right(model: Any, shared: _Shared) -> bool:
    """Whether a few tokens have the log-probabilities that they have when nothing is shared; tried once."""
    if shared == _Shared():
        return True
    tried = _TRIED.setdefault(model, {})
    key = shared, getattr(model.config, "_attn_implementation", None)
    if key not in tried:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        rows = [Encoded(tuple(token % vocabulary for token in ids), 2, len(ids) - 1) for ids in _TRIAL] * 2
        arms = [(float(place >= len(_TRIAL)),) for place in range(len(rows))]  # two, which nothing steers
        scorer = _Scorer(model, (), Positions.GENERATED, len(rows), 1 << 10)
        plain = torch.cat(scorer.scores(rows, arms))
        try:
            found = torch.cat(replace(scorer, shared=shared).scores(rows, arms))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, SteeringError):
            tried[key] = False
        else:
            eps, size, error = torch.finfo(model.dtype).eps, plain.abs().mean(), (found - plain).abs()
            tried[key] = bool(error.max() <= eps**0.5 * size) and bool(error.mean() <= max(4 * eps, 1e-5) * size)
    return tried[key]


def _have_beginnings(rows: Sequence[Encoded]) -> bool:
    """Whether some prompt has several answers."""
    return len({row.ids[: row.start + 1] for row in rows}) < len({row.ids for row in rows})


def _read(row: Encoded) -> Tokens:
    """What of a row is computed after its prefix: all but the answer's last token, after which nothing is asked."""
    return row.ids[row.start : max(row.start + 1, row.end)]


def _reach(model: Any) -> int:
    """So many tokens are attended to in every layer. In longer texts a layer looks at what is near alone, which a tree
    cannot say."""
    config = text_config(model)
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    return min((window for window in windows if isinstance(window, int)), default=1 << 30)


def _gathered(logits: Tensor, where: Sequence[tuple[int, int, int]]) -> Tensor:
    """Of logits [rows, tokens, vocabulary] the log-probabilities of (row, token, vocabulary) each, on the CPU."""
    row, at, target = torch.tensor(where, dtype=torch.int64, device=logits.device).view(-1, 3).unbind(1)
    totals = torch.stack([one.float().logsumexp(-1) for one in logits])  # one by one, since they are large
    return (logits[row, at, target].float() - totals[row, at]).cpu()


def _selected(cache: Any, places: Sequence[int], blocks: slice = slice(None)) -> Any:
    """A cache of these rows of `cache`, which stays as it is; of `blocks` alone, where a pass uses no others."""
    if cache is None:
        return None
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    index = torch.tensor(places)
    for layer in found.layers[blocks]:
        layer.batch_select_indices(index)
    return found


def _common(texts: Sequence[Tokens]) -> Tokens:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    return first[: shared_length(first, last)]


def _kept(model: Any, count: int) -> dict[str, int]:
    """How many positions' logits a forward pass computes, where the model can be told."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
