"""Given texts instead of new ones: log-probabilities of continuations (teacher forcing)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.sequence import (
    OWN_SHARE,
    Event,
    Failed,
    SamplingParams,
    ScheduledChunk,
    Scored,
    ScoredTokens,
    Sequence,
    ShareKey,
    SteeringParams,
    TokenLogprob,
)
from server.errors import ServerError
from steering.bank import upload

LOGITS_BUDGET = 64 * 2**20  # numbers held at once for scores: 64 Mi float32 are 256 MB


@dataclass(frozen=True)
class ComparisonPair:
    """A continuation of a prompt, beside that of a reference (mostly the unsteered one), to be compared."""

    prompt: tuple[int, ...]
    steered: tuple[int, ...]
    baseline: tuple[int, ...]
    steering: SteeringParams
    base: SteeringParams = field(default_factory=SteeringParams)

    def sequences(self, request_id: str, share: ShareKey = OWN_SHARE) -> list[Sequence]:
        """The steered text as it was steered and as the reference is, in the same steps, and the reference's own text,
        in the share `share`. Distributions are the model's own, before temperature and other sampling
        rules."""
        mine = to_score(request_id, 0, self.prompt, self.steered, self.steering, share=share)
        under_base = to_score(request_id, 1, self.prompt, self.steered, self.base, share=share)
        under_base.follow(mine)
        return [mine, under_base, to_score(request_id, 2, self.prompt, self.baseline, self.base, share=share)]


class ScoreCollector:
    """Takes the events of sequences that are scored; gives their scores in order, or the first error."""

    def __init__(self, count: int) -> None:
        self._scored: list[Scored] = []
        self._error: ServerError | None = None
        self._left = count

    def add(self, event: Event) -> "list[Scored] | ServerError | None":
        """None: more will come."""
        if isinstance(event, Failed):
            self._error = self._error or event.error
        elif isinstance(event, Scored):
            self._scored.append(event)
        self._left -= 1
        if self._left:
            return None
        return self._error or sorted(self._scored, key=lambda scored: scored.sequence.index)


def max_num_logits(vocab_size: int) -> int:
    """For how many tokens of one pass logits are kept for scores."""
    return max(2, LOGITS_BUDGET // vocab_size)


def to_score(
    request_id: str,
    index: int,
    prompt: tuple[int, ...],
    continuation: tuple[int, ...],
    steering: SteeringParams,
    top: int = 0,
    share: ShareKey = OWN_SHARE,
) -> Sequence:
    """A continuation to score, beside the `top` likeliest tokens in each place. Raises ValueError for an empty one."""
    if not continuation:
        raise ValueError("a continuation to score has at least one token")
    sampling = SamplingParams(logprobs=top)
    return Sequence(request_id, index, prompt, sampling, steering, continuation=continuation, share=share)


@dataclass(frozen=True)
class PendingScores:
    """Scores of one step's chunks, still on the device: of each chunk the log-probabilities of its tokens, and those of
    the likeliest [tokens, k], and the sum of its divergences."""

    logprobs: Mapping[ScheduledChunk, Tensor]
    top: Mapping[ScheduledChunk, tuple[Tensor, Tensor]]
    kl: Mapping[ScheduledChunk, Tensor]

    def tensors(self) -> dict[Hashable, Tensor]:
        """What is to be copied to the host."""
        found: dict[Hashable, Tensor] = {}
        for chunk, logprobs in self.logprobs.items():
            found |= {(chunk, "logprobs"): logprobs, (chunk, "kl"): self.kl.get(chunk, logprobs.new_zeros(()))}
            found |= {(chunk, "top_tokens"): self.top[chunk][0], (chunk, "top_logprobs"): self.top[chunk][1]}
        return found

    def result(self, arrays: Mapping[Hashable, NDArray[Any]]) -> dict[ScheduledChunk, ScoredTokens]:
        """`arrays`: the `tensors`, on the host."""
        scored = {}
        for chunk in self.logprobs:
            top = (map(tuple, arrays[chunk, name].tolist()) for name in ("top_tokens", "top_logprobs"))
            each = zip(_targets(chunk), arrays[chunk, "logprobs"].tolist(), *top, strict=True)
            scored[chunk] = ScoredTokens(tuple(TokenLogprob(*one) for one in each), float(arrays[chunk, "kl"]))
        return scored


def score_chunks(logits: Mapping[ScheduledChunk, Tensor]) -> PendingScores:
    """logits [tokens, vocab] of what follows each of the chunks' last `num_logits` tokens. Chunks whose sequences are
    in lockstep are of the same tokens."""
    chosen, top, kl = {}, {}, {}
    logprobs = {chunk: torch.log_softmax(numbers.float(), dim=-1) for chunk, numbers in logits.items()}
    chunk_of = {chunk.sequence: chunk for chunk in logits}
    for chunk, mine in logprobs.items():
        targets = upload(np.array(_targets(chunk), dtype=np.int64), mine.device)
        chosen[chunk] = mine.gather(1, targets[:, None])[:, 0]
        best = mine.topk(min(chunk.sequence.sampling_params.logprobs or 0, mine.shape[-1]), dim=-1)
        top[chunk] = best.indices, best.values
        for follower in chunk.sequence.lockstep[1:]:
            base = logprobs[chunk_of[follower]]
            # A token that is impossible under the model adds nothing; its difference of infinities would be NaN.
            kl[chunk] = (mine.exp() * (mine - base)).masked_fill(mine == -torch.inf, 0.0).sum(dim=-1).double().sum()
    return PendingScores(chosen, top, kl)


def _targets(chunk: ScheduledChunk) -> tuple[int, ...]:
    """The tokens that come after those of which logits are wanted."""
    sequence = chunk.sequence
    first = chunk.end - chunk.num_logits - sequence.num_prompt_tokens + 1
    return (sequence.continuation or ())[first : first + chunk.num_logits]
