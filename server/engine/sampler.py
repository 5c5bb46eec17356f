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

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.sequence import SamplingParams
from steering.bank import upload

GREEDY_BELOW = 1e-4  # a temperature under this would overflow the logits; the result is the same
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15: splitmix64's increment, as a signed 64-bit integer
DIGITS = 11, 10, 10  # bits of each, of the 31 of a float32 that is not negative, the highest first
CHANCE_BITS = 42
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

    def tensors(self) -> dict[Hashable, Tensor]:
        """What is to be copied to the host, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


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
        penalised = [row for row, one in enumerate(params) if one.is_penalised]
        self._penalised = upload(np.array(penalised, dtype=np.int64), device) if penalised else None
        self._repetition = column([params[row].repetition_penalty for row in penalised])
        self._frequency = column([params[row].frequency_penalty for row in penalised])
        self._presence = column([params[row].presence_penalty for row in penalised])
        self._adjusts = any(one.is_penalised or one.logit_bias or one.min_tokens for one in params)
        drawn = [row for row, one in enumerate(params) if one.temperature >= GREEDY_BELOW]
        by_k = [row for row in drawn if 0 < params[row].top_k < vocab]
        by_p = [row for row in drawn if row not in by_k and params[row].top_p < 1]
        self._nuclei: list[_TopK | _TopP] = [_TopK.of(by_k, params, device)] if by_k else []
        if by_p:
            self._nuclei.append(_TopP(upload(np.array(by_p), device), column([params[row].top_p for row in by_p])))
        self._min_p = column([one.min_p for one in params])
        self._keys = upload(_keys([(one.seed, one.choice) for one in params]).numpy(), device)

    def sample(self, logits: Tensor, steps: Sequence[int], texts: "TokenCounts | None" = None) -> SamplerOutput:
        """logits [rows, vocab] of any float type -> one token a row. `steps`: how many tokens have been sampled for it;
        `texts`: the texts of the rows that are penalised, in order, to which the new tokens are added."""
        raw = logits.float()
        scores = self._adjusted(raw, steps, texts)
        tokens = scores.argmax(dim=-1)
        if self._samples:
            tokens = torch.where(self._greedy, tokens, self._sample(scores, steps))
        if self._penalised is not None and texts is not None:
            texts.add(tokens[self._penalised])
        return self._described(raw, tokens)

    def _adjusted(self, raw: Tensor, steps: Sequence[int], texts: "TokenCounts | None") -> Tensor:
        """After the first five rules. Only the rows that a rule is about are looked at."""
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
        if self._penalised is not None:
            assert texts is not None, "penalties are about texts"
            sampled, in_prompt = texts.counts()
            found, penalty = scores[self._penalised], self._repetition
            penalised = torch.where(found < 0, found * penalty, found / penalty)
            found = torch.where(in_prompt | (sampled > 0), penalised, found)
            found = found - self._frequency * sampled - self._presence * (sampled > 0)
            scores.index_copy_(0, self._penalised, found)
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
        """Sets what top_k, top_p and min_p exclude to -inf, in place."""
        for nuclei in self._nuclei:
            part = scores[nuclei.rows]
            scores.index_copy_(0, nuclei.rows, part.masked_fill(~nuclei.kept(part), -torch.inf))
        if any(one.min_p > 0 for one in self._params):
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


@dataclass(frozen=True)
class _TopK:
    """Rows that draw from their likeliest tokens alone: top_k of them, and of those the first that reach top_p
    together."""

    rows: Tensor  # [n] int64
    most: int  # tokens of each that have to be put in order
    top_k: Tensor  # [n, 1] int64
    top_p: Tensor  # [n, 1] float32
    whole: bool  # no row has a top_p

    @classmethod
    def of(cls, rows: list[int], params: Sequence[SamplingParams], device: torch.device) -> "_TopK":
        top_k = np.array([[params[row].top_k] for row in rows])
        top_p = np.array([[params[row].top_p] for row in rows], dtype=np.float32)
        most, whole = int(top_k.max()), bool((top_p >= 1).all())
        return cls(upload(np.array(rows), device), most, upload(top_k, device), upload(top_p, device), whole)

    def kept(self, scores: Tensor) -> Tensor:
        """scores [n, vocab] -> bool. A token stays while the likelier ones do not reach top_p; the first always stays.
        Of those that are equally likely the first come first, and all have a place among the top_k."""
        ordered = scores.topk(self.most, dim=-1).values
        best, kth, everything = ordered[:, :1], ordered.gather(1, self.top_k - 1), self.top_p >= 1
        if self.whole:
            return scores >= kth
        # More may be as likely as the last of them. Sums in float64, so that rounding does not depend on other rows.
        every = (scores - best).exp().masked_fill(scores < kth, 0)
        total = every.sum(dim=-1, keepdim=True, dtype=torch.float64)
        chances = (ordered - best).exp().masked_fill(ordered < kth, 0) / total
        before = chances.cumsum(dim=-1) - chances
        stays = (ordered >= kth) & ((before < self.top_p) | everything)
        last = ordered.gather(1, (stays.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
        # As many of those that are as likely as the last one as have a place.
        equal = scores == last
        likelier = before.masked_fill(ordered != last, torch.inf).amin(dim=-1, keepdim=True)
        rank = equal.cumsum(dim=-1, dtype=torch.int32) - 1
        has_place = (likelier + rank * (last - best).exp() / total < self.top_p) | (rank == 0) | everything
        return (scores > last) | (equal & has_place)


@dataclass(frozen=True)
class _TopP:
    """Rows that draw from the first of their likeliest tokens that reach top_p together, however many those are.

    No token is put in order. How far a token is behind the best one is a float whose bits, as an integer, grow with it:
    sums over those with the same highest digit say at which digit top_p is reached, and so on among those with that
    digit (radix select). Chances are integers, so that sums are the same in every order.
    """

    rows: Tensor  # [n] int64
    top_p: Tensor  # [n, 1] float32, below 1

    def kept(self, scores: Tensor) -> Tensor:
        """See `_TopK.kept`."""
        behind = (scores.amax(dim=-1, keepdim=True) - scores).nan_to_num_(nan=torch.inf)
        keys, chances = behind.view(torch.int32), _chances(behind)
        reached = chances.sum(dim=-1, keepdim=True).double() * self.top_p
        before = last = chances.new_zeros(len(scores), 1)  # the chances of likelier tokens, and the key of the last one
        shift = sum(DIGITS)
        for bits in DIGITS:
            shift -= bits
            digit = (keys >> shift & (1 << bits) - 1).long()
            sums = chances.new_zeros(len(scores), 1 << bits).scatter_add_(1, digit, chances)
            ends = before + sums.cumsum(dim=-1)
            at = (ends < reached).sum(dim=-1, keepdim=True).clamp(max=(1 << bits) - 1)
            before = ends.gather(1, at) - sums.gather(1, at)
            last = last + (at << shift)
            chances.masked_fill_(digit != at, 0)
        equal = keys == last
        rank = equal.cumsum(dim=-1, dtype=torch.int32) - 1
        has_place = (before + rank * _chances(last.int().view(torch.float32)) < reached) | (rank == 0)
        return (keys < last) | (equal & has_place)


def _chances(behind: Tensor) -> Tensor:
    """exp(-behind) in units of which many make the best token's: sums over a vocabulary stay within int64."""
    return (-behind).exp_().mul_(2.0**CHANCE_BITS).long()


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


@dataclass(frozen=True)
class PenalisedText:
    """The tokens of a text that the host knows, the prompt first; `length` of them are to be counted, of which the last
    one may be known to the device alone."""

    token_ids: Sequence[int]
    prompt_token_ids: tuple[int, ...]  # the choices of a request may share one
    length: int


class TokenCounts:
    """How often each token is in the texts of some rows, on the device: tokens are counted as they are sampled, before
    the host knows them."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._sampled = torch.zeros(0, vocab, dtype=torch.int32, device=device)  # [slots, vocab]
        self._in_prompt = torch.zeros(0, vocab, dtype=torch.bool, device=device)
        self._slots: dict[Hashable, int] = {}  # in the order of the rows
        self._lengths: dict[Hashable, int] = {}
        self._at = torch.zeros(0, dtype=torch.int64, device=device)

    def hold(self, texts: Mapping[Hashable, PenalisedText]) -> None:
        """From now on these texts are counted, in this order. What has been counted of one of them is kept."""
        known = {key for key, text in texts.items() if self._lengths.get(key) == text.length}
        if len(known) == len(texts) and list(texts) == list(self._slots):
            return
        kept = {key: slot for key, slot in self._slots.items() if key in known}
        more = len(texts) - len(self._sampled)
        if more > 0:
            more = max(more, len(self._sampled))
            self._sampled = torch.cat([self._sampled, self._sampled.new_zeros(more, self._vocab)])
            self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(more, self._vocab)])
        free = sorted(set(range(len(self._sampled))) - set(kept.values()), reverse=True)
        new = {key: free.pop() for key in texts if key not in kept}
        self._slots = {key: kept[key] if key in kept else new[key] for key in texts}
        self._lengths = {key: text.length for key, text in texts.items()}
        self._at = upload(np.array(list(self._slots.values()), dtype=np.int64), self._device)
        if new:
            self._count({slot: texts[key] for key, slot in new.items()})

    def counts(self) -> tuple[Tensor, Tensor]:
        """How often each token has been sampled [texts, vocab] int32, and whether it is in the prompt, bool."""
        return self._sampled[self._at], self._in_prompt[self._at]

    def add(self, tokens: Tensor) -> None:
        """tokens [texts] int64: what has been sampled, one for each."""
        self._add(self._at, tokens)
        self._lengths = {key: length + 1 for key, length in self._lengths.items()}

    def _count(self, texts: Mapping[int, PenalisedText]) -> None:
        """Into slots, from the beginning."""
        assert all(len(text.token_ids) >= text.length for text in texts.values()), "only the device knows a token"
        slots = upload(np.array(list(texts), dtype=np.int64), self._device)
        self._sampled.index_fill_(0, slots, 0)
        self._in_prompt.index_fill_(0, slots, False)
        prompts = {id(text.prompt_token_ids): text.prompt_token_ids for text in texts.values()}
        distinct = {key: np.unique(np.array(prompt, dtype=np.int64)) for key, prompt in prompts.items()}
        in_prompts = {slot: distinct[id(text.prompt_token_ids)] for slot, text in texts.items()}
        sampled = {
            slot: np.array(text.token_ids[len(text.prompt_token_ids) : text.length], dtype=np.int64)
            for slot, text in texts.items()
        }
        self._in_prompt.view(-1).index_fill_(0, self._places(*self._entries(in_prompts)), True)
        self._add(*self._entries(sampled))

    def _entries(self, texts: Mapping[int, NDArray[np.int64]]) -> Tensor:
        """Slots and tokens [2, N]."""
        slots = np.repeat(np.array(list(texts), dtype=np.int64), [len(tokens) for tokens in texts.values()])
        return upload(np.stack([slots, np.concatenate(list(texts.values()))]), self._device)

    def _add(self, slots: Tensor, tokens: Tensor) -> None:
        ones = self._sampled.new_ones(len(tokens))
        self._sampled.view(-1).scatter_add_(0, self._places(slots, tokens), ones)

    def _places(self, slots: Tensor, tokens: Tensor) -> Tensor:
        return slots * self._vocab + tokens


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
