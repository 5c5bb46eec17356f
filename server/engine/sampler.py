"""Sample one token for every row of a batch at once, each row by its own parameters.

What is sampled for a row depends on nothing but its own logits, tokens, parameters, seed and step: the random number is
a hash of (seed, choice, step), and a parameter that is off for a row leaves that row's numbers as they were, even where
a neighbour switches it on.

Parameters act in this order; the first five are in vLLM's, the last ones in that of transformers' `generate`:

1. `min_tokens`: before so many tokens the logits of those that end the text are -inf
2. `logit_bias`: added to the logits
3. `repetition_penalty` (Keskar et al. 2019, arXiv 1909.05858): the logits of tokens in the prompt or the text are
   divided by it, those below 0 multiplied
4. `frequency_penalty` (OpenAI's API reference): as often as a token is in the text, it is taken from its logit
5. `presence_penalty` (the same): once
6. `temperature`, `top_k`, `top_p` and `min_p`, one after the other

Log-probabilities are the model's own, before all of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.sequence import SamplingParams
from steering.bank import upload

GREEDY_BELOW = 1e-4  # a temperature under this would overflow the logits; the result is the same
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15: splitmix64's increment, as a signed 64-bit integer
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(frozen=True)
class SamplerOutput:
    """What one step samples for a batch, still on the device."""

    tokens: Tensor  # [rows] int64
    finite: Tensor  # [rows] bool; False: NaN or infinite logits, from which nothing can be sampled
    logprobs: Tensor | None  # [rows] float32, of the sampled tokens
    top_tokens: Tensor | None  # [rows, k] int64
    top_logprobs: Tensor | None  # [rows, k] float32


class Sampler:
    """The sampling parameters of the rows of a batch, on the device; made anew for other rows."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        vocab: int,
        device: torch.device,
        end_token_ids: Sequence[Collection[int]] = (),
    ) -> None:
        """`end_token_ids`: of each row the tokens that end its text, for `min_tokens`."""

        def column(values: Sequence[float]) -> Tensor:
            return upload(np.array(values, dtype=np.float32), device)[:, None]

        self._params = list(params)
        self._device = device
        self._samples = any(one.temperature >= GREEDY_BELOW for one in params)
        self._temperature = column([max(one.temperature, GREEDY_BELOW) for one in params])
        self._greedy = upload(np.array([one.temperature < GREEDY_BELOW for one in params]), device)
        self._endings = _Entries(
            [(row, token) for row, ends in enumerate(end_token_ids) if params[row].min_tokens for token in ends]
        )
        self._endings_until = np.array([params[row].min_tokens for row in self._endings.rows], dtype=np.int64)
        biases = [(row, token, bias) for row, one in enumerate(params) for token, bias in one.logit_bias]
        self._biased = _Entries([(row, token) for row, token, _ in biases])
        self._bias = np.array([bias for _, _, bias in biases], dtype=np.float32)
        self._repetition = np.array([one.repetition_penalty for one in params], dtype=np.float32)
        self._frequency = np.array([one.frequency_penalty for one in params], dtype=np.float32)
        self._presence = np.array([one.presence_penalty for one in params], dtype=np.float32)
        self._adjusts = any(one.is_penalised or one.logit_bias or one.min_tokens for one in params)
        self._top_k = upload(np.array([min(one.top_k or vocab, vocab) for one in params]), device)
        self._top_p = column([one.top_p for one in params])
        self._min_p = column([one.min_p for one in params])
        self._keys = upload(_keys([(one.seed, one.choice) for one in params]).numpy(), device)

    def sample(self, logits: Tensor, token_ids: Sequence[Sequence[int]], steps: Sequence[int]) -> SamplerOutput:
        """logits [rows, vocab] of any float type -> one token a row. `token_ids`: what each row has had, prompt
        included; `steps`: how many tokens have been sampled for it, which are the last of them."""
        raw = logits.float()
        scores = self._adjusted(raw, token_ids, steps)
        tokens = scores.argmax(dim=-1)
        if self._samples:
            tokens = torch.where(self._greedy, tokens, self._sample(scores, steps))
        return self._described(raw, tokens)

    def _adjusted(self, raw: Tensor, token_ids: Sequence[Sequence[int]], steps: Sequence[int]) -> Tensor:
        """After the first five rules. Only the logits that a rule is about are looked at."""
        if not self._adjusts:
            return raw
        scores = raw.clone()
        due = np.array(steps)[self._endings.rows] < self._endings_until
        if due.any():
            at = self._endings.only(due).on(self._device)
            scores.index_put_(at, torch.full((), -torch.inf, device=self._device))
        if len(self._biased):
            at = self._biased.on(self._device)
            scores.index_put_(at, scores[at] + upload(self._bias, self._device))
        if rows := np.flatnonzero(self._repetition != 1).tolist():
            seen, _ = _count(rows, [token_ids[row] for row in rows], scores.shape[-1])
            at, penalty = seen.on(self._device), upload(self._repetition[seen.rows], self._device)
            found = scores[at]
            scores.index_put_(at, torch.where(found < 0, found * penalty, found / penalty))
        if rows := np.flatnonzero((self._frequency != 0) | (self._presence != 0)).tolist():
            texts = [token_ids[row][len(token_ids[row]) - steps[row] :] for row in rows]
            seen, counts = _count(rows, texts, scores.shape[-1])
            if len(seen):
                at, frequency = seen.on(self._device), upload(self._frequency[seen.rows] * counts, self._device)
                presence = upload(self._presence[seen.rows], self._device)
                scores.index_put_(at, scores[at] - frequency - presence)
        return scores

    def _sample(self, scores: Tensor, steps: Sequence[int]) -> Tensor:
        scores = self._restrict(scores / self._temperature)
        # In float64, so that the sum's rounding does not depend on how many rows share the batch.
        cumulative = torch.softmax(scores, dim=-1).double().cumsum(dim=-1)
        total = cumulative[:, -1:]
        chances = uniforms(self._keys, upload(np.array(steps), self._device))
        target = torch.minimum(chances[:, None] * total, total.nextafter(total - 1))
        # right=True: the first token whose cumulative probability exceeds the target, hence one with some probability.
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)

    def _restrict(self, scores: Tensor) -> Tensor:
        """Set what top_k, top_p and min_p exclude to -inf."""
        params = self._params
        if any(one.top_k or one.top_p < 1 for one in params):
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            kth = ordered.gather(1, self._top_k[:, None] - 1)
            ordered = ordered.masked_fill(ordered < kth, -torch.inf)
            probabilities = torch.softmax(ordered, dim=-1)
            # A token stays while the ones before it do not reach top_p yet; the first always stays.
            excluded = (probabilities.cumsum(dim=-1) - probabilities >= self._top_p) & (self._top_p < 1)
            excluded[:, 0] = False
            scores = torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(excluded, -torch.inf))
        if any(one.min_p > 0 for one in params):
            best = scores.amax(dim=-1, keepdim=True)
            scores = scores.masked_fill(scores < best + self._min_p.log(), -torch.inf)
        return scores

    def _described(self, raw: Tensor, tokens: Tensor) -> SamplerOutput:
        # The largest logit is NaN where one is, and infinite where all or the best are.
        finite = raw.amax(dim=-1).isfinite()
        wanted = [one.logprobs for one in self._params if one.logprobs is not None]
        if not wanted:
            return SamplerOutput(tokens, finite, None, None, None)
        logprobs = torch.log_softmax(raw, dim=-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        if not (most := min(max(wanted), logprobs.shape[-1])):
            return SamplerOutput(tokens, finite, chosen, None, None)
        top = logprobs.topk(most, dim=-1)
        return SamplerOutput(tokens, finite, chosen, top.indices, top.values)


class _Entries:
    """Some places in [rows, vocab], each once."""

    def __init__(self, places: Sequence[tuple[int, int]] | NDArray[np.int64]) -> None:
        """places: (row, token) [N]."""
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def rows(self) -> NDArray[np.int64]:
        return self._places[:, 0]

    def only(self, chosen: NDArray[np.bool_]) -> "_Entries":
        return _Entries(self._places[chosen])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and tokens [N], to index with."""
        rows, tokens = upload(np.ascontiguousarray(self._places.T), device)
        return rows, tokens


def _count(rows: Sequence[int], texts: Sequence[Sequence[int]], vocab: int) -> tuple[_Entries, NDArray[np.float32]]:
    """The different tokens of each row's text, and how often each is there."""
    tokens = np.concatenate([np.array(text, dtype=np.int64) for text in texts])
    keys, counts = np.unique(
        np.repeat(np.array(rows), [len(text) for text in texts]) * vocab + tokens, return_counts=True
    )
    return _Entries(np.stack(np.divmod(keys, vocab), axis=-1)), counts.astype(np.float32)


def uniforms(keys: Tensor, steps: Tensor) -> Tensor:
    """keys, steps [rows] int64 -> [rows] float64 in [0, 1): splitmix64 (Steele, Lea, Flood 2014) of key and step."""
    mixed = _mix(keys + (steps + 1) * GOLDEN)
    return _shift(mixed, 11).double() * 2.0**-53


def _keys(seeds: Sequence[tuple[int, int]]) -> Tensor:
    """One int64 a row from (seed, choice)."""
    seed = torch.tensor([_wrapped(seed) for seed, _ in seeds], dtype=torch.int64)
    choice = torch.tensor([_wrapped(choice * GOLDEN) for _, choice in seeds], dtype=torch.int64)
    return _mix(_mix(seed + GOLDEN) ^ choice)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * MIX_1
    state = (state ^ _shift(state, 27)) * MIX_2
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own brings in the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(value: int) -> int:
    """Any integer as a signed 64-bit one."""
    return (value + 2**63) % 2**64 - 2**63
