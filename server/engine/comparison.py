"""How far steering moved the model: the same texts, teacher-forced, with and without it."""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from server.engine.forward import Forward, acts
from server.engine.types import Divergence, Pair
from server.errors import NotFinite
from steering.columns import UNSTEERED

# Logits held at once, in numbers: 64 Mi float32 are 256 MB.
BUDGET = 64 * 2**20
LARGEST_EXPONENT = 700.0  # math.exp overflows beyond 709


def compare(forward: Forward, pair: Pair) -> Divergence:
    """One pass of three rows over prompt and answer: the steered text steered, the steered text unsteered, the
    baseline text unsteered. Distributions are the model's own, before temperature and other sampling rules.

    Raises NotFinite where the model's output is not.
    """
    reader = _Reader(forward, pair)
    start, last = len(pair.prompt) - 1, len(pair.prompt) + max(len(pair.steered), len(pair.baseline)) - 1
    if start:
        reader.read(0, start, last_only=True)
    kl, steered, baseline = 0.0, 0.0, 0.0
    while start < last:
        # The first chunk is one token wide: it tells the size of the vocabulary.
        logprobs = torch.log_softmax(reader.read(start, min(last, start + reader.chunk)).float(), dim=-1)
        answer = start - len(pair.prompt) + 1  # index of the answer's token that the chunk's first logits predict
        start += logprobs.shape[1]
        mine, base = logprobs[0], logprobs[1]
        # A token that is impossible under the model adds nothing; its difference of infinities would be NaN.
        divergence = (mine.exp() * (mine - base)).masked_fill(mine == -torch.inf, 0.0).sum(dim=-1)
        kl += float(divergence[: max(0, len(pair.steered) - answer)].double().sum())
        steered += _told(base, pair.steered[answer:])
        baseline += _told(logprobs[2], pair.baseline[answer:])
    # Before max() and min(), which would turn NaN into a number.
    if not all(map(math.isfinite, (kl, steered, baseline))):
        raise NotFinite("The steered and the unsteered text cannot be compared: the model's output is not finite.")
    steered_mean, baseline_mean = steered / len(pair.steered), baseline / len(pair.baseline)
    return Divergence(
        kl_per_token=max(0.0, kl / len(pair.steered)),
        logprob_under_baseline=steered_mean,
        perplexity_ratio=math.exp(min(LARGEST_EXPONENT, baseline_mean - steered_mean)),
    )


def _told(logprobs: Tensor, tokens: tuple[int, ...]) -> float:
    """logprobs [tokens, vocab] -> the sum of those of the tokens that came."""
    told = torch.tensor(tokens[: len(logprobs)], dtype=torch.int64, device=logprobs.device)
    return float(logprobs[: len(told)].gather(1, told[:, None]).double().sum())


class _Reader:
    """Feeds the three rows in chunks. Shorter rows are padded on the right, where nothing looks at the padding."""

    ROWS = 3

    def __init__(self, forward: Forward, pair: Pair) -> None:
        texts = [pair.prompt + answer for answer in (pair.steered, pair.steered, pair.baseline)]
        ids = np.zeros((self.ROWS, max(map(len, texts))), dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        self.chunk = 1
        self._forward = forward
        self._pair = pair
        self._ids = torch.from_numpy(ids).to(forward.device)
        self._cache = DynamicCache(config=forward.config)

    def read(self, start: int, stop: int, *, last_only: bool = False) -> Tensor:
        """Logits [3, stop - start (or 1), vocab] of the tokens start..stop."""
        token_rows = np.full((self.ROWS, stop - start), -1, dtype=np.int64)
        token_rows[0] = np.where(acts(self._pair.steer.positions, start, stop, len(self._pair.prompt)), 0, -1)
        logits, _ = self._forward(
            self._ids[:, start:stop],
            torch.arange(start, stop, device=self._forward.device).expand(self.ROWS, -1),
            cache=self._cache,
            rows=[self._pair.steer.columns, UNSTEERED, UNSTEERED],
            token_rows=token_rows.reshape(-1),
            last_only=last_only,
        )
        self.chunk = max(1, BUDGET // (self.ROWS * logits.shape[-1]))
        return logits
