"""Sample one token for every row of a batch at once, each row by its own parameters.

What is sampled for a row depends on nothing but its own logits, parameters, seed and step: the random number is a hash
of (seed, choice, step), and a parameter that is off for a row leaves that row's numbers as they were, even where a
neighbour switches it on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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

    def __init__(self, params: Sequence[SamplingParams], vocab: int, device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return upload(np.array(values, dtype=np.float32), device)[:, None]

        self._params = list(params)
        self._device = device
        self._samples = any(one.temperature >= GREEDY_BELOW for one in params)
        self._temperature = column([max(one.temperature, GREEDY_BELOW) for one in params])
        self._greedy = upload(np.array([one.temperature < GREEDY_BELOW for one in params]), device)
        self._penalty = column([one.repetition_penalty for one in params])
        self._top_k = upload(np.array([min(one.top_k or vocab, vocab) for one in params]), device)
        self._top_p = column([one.top_p for one in params])
        self._min_p = column([one.min_p for one in params])
        self._keys = upload(_keys([(one.seed, one.choice) for one in params]).numpy(), device)

    def sample(self, logits: Tensor, token_ids: Sequence[Sequence[int]], steps: Sequence[int]) -> SamplerOutput:
        """logits [rows, vocab] of any float type -> one token a row. `token_ids`: what each row has had, prompt
        included; `steps`: how many tokens have been sampled for it. Parameters act in the order of transformers'
        `generate`: repetition penalty, temperature, top_k, top_p, min_p."""
        raw = logits.float()
        scores = self._penalise(raw, token_ids)
        tokens = scores.argmax(dim=-1)
        if self._samples:
            tokens = torch.where(self._greedy, tokens, self._sample(scores, steps))
        return self._described(raw, tokens)

    def _penalise(self, raw: Tensor, token_ids: Sequence[Sequence[int]]) -> Tensor:
        penalised = [row for row, one in enumerate(self._params) if one.repetition_penalty != 1]
        if not penalised:
            return raw
        seen = torch.zeros(raw.shape, dtype=torch.bool)
        for row in penalised:
            seen[row, torch.tensor(token_ids[row])] = True
        seen = upload(seen.numpy(), self._device)
        return torch.where(seen, torch.where(raw < 0, raw * self._penalty, raw / self._penalty), raw)

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
