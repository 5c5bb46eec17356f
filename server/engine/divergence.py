"""How far steering moved the model on a pair of texts."""

import math
from dataclasses import dataclass

from server.engine.sequence import Scored, TokenLogprob
from server.errors import NotFinite

LARGEST_EXPONENT = 700.0  # math.exp overflows beyond 709


@dataclass(frozen=True)
class Divergence:
    """How far steering moved the model on one pair, from teacher-forced passes (nats, natural logarithms)."""

    kl_per_token: float  # mean over the steered text of KL(steered || reference)
    logprob_under_baseline: float  # mean log-probability per token of the steered text, reference model
    perplexity_ratio: float  # reference model: perplexity of the steered text / of the reference's text

    @classmethod
    def of(cls, scored: list[Scored]) -> "Divergence":
        """From the scores of `ComparisonPair.sequences`. Raises NotFinite."""
        mine, under_base, own = scored
        steered_mean, baseline_mean = _mean(under_base.logprobs), _mean(own.logprobs)
        if not (math.isfinite(steered_mean) and math.isfinite(baseline_mean)):
            raise NotFinite("The steered and the unsteered text cannot be compared: the model's output is not finite.")
        return cls(
            kl_per_token=max(0.0, mine.kl / len(mine.logprobs)),
            logprob_under_baseline=steered_mean,
            perplexity_ratio=math.exp(min(LARGEST_EXPONENT, baseline_mean - steered_mean)),
        )


def _mean(logprobs: tuple[TokenLogprob, ...]) -> float:
    return sum(one.logprob for one in logprobs) / len(logprobs)
