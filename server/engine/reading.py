"""Given texts instead of new ones: teacher-forced passes in parts, between the engine's steps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.runner import Runner
from server.engine.tape import Tape, Work
from server.engine.types import Divergence, Job, Likelihood, Pair, Steer
from server.errors import NotFinite, PromptTooLong

# Logits held at once, in numbers: 64 Mi float32 are 256 MB.
BUDGET = 64 * 2**20
LARGEST_EXPONENT = 700.0  # math.exp overflows beyond 709
TOGETHER = 8  # continuations that are scored in one pass, where the cache has room for them


class Reading:
    """Texts that are read side by side: of each, the logits from its last prompt token on.

    `open` it, `read` until it is `finished`, `close` it.
    """

    def __init__(self, runner: Runner, tapes: Sequence[Tape]) -> None:
        self._runner = runner
        self._tapes = tapes
        self._step = max(1, min(runner.step_tokens, BUDGET // runner.vocab) // len(tapes))  # tokens a text

    @property
    def finished(self) -> bool:
        return all(not tape.pending for tape in self._tapes)

    def open(self) -> Job[None]:
        """Takes space for all of the texts; holds none while it waits for the rest."""
        cache = self._runner.cache
        if cache.places(max(len(tape.tokens) for tape in self._tapes)) < len(self._tapes):
            raise PromptTooLong(f"The cache has no room for {len(self._tapes)} texts as long as this one.")
        while True:
            opened = [tape for tape in self._tapes if cache.open(tape, len(tape.tokens))]
            if len(opened) == len(self._tapes):
                return
            for tape in opened:
                cache.close(tape, keep=False)
            yield True

    def read(self) -> list[Tensor]:
        """One pass: log-probabilities [tokens, vocab] float32 for each text, of what may come after the tokens read."""
        behind = [tape for tape in self._tapes if tape.cached < tape.prompt - 1]
        works = []
        for tape in behind or [tape for tape in self._tapes if tape.pending]:
            end = tape.prompt - 1 if behind else len(tape.tokens)
            works.append(Work(tape, tape.cached, min(end, tape.cached + self._step)))
        wanted = [] if behind else list(range(sum(map(len, works))))
        logits, counts = self._runner.compute(works, wanted or [0])
        steered = counts.tolist()
        parts: dict[Tape, Tensor] = {}
        place = 0
        for work in works:
            work.tape.cached = work.stop
            work.tape.steered += steered[place : place + len(work)]
            if wanted:
                parts[work.tape] = torch.log_softmax(logits[place : place + len(work)].float(), dim=-1)
            place += len(work)
        nothing = logits.new_empty(0, logits.shape[-1], dtype=torch.float32)
        return [parts.get(tape, nothing) for tape in self._tapes]

    def close(self) -> None:
        for tape in self._tapes:
            if tape.extent is not None:
                self._runner.cache.close(tape)


def compare(runner: Runner, pair: Pair) -> Job[Divergence]:
    """The steered text as it was steered and as the reference is, side by side, then the reference's own text.
    Distributions are the model's own, before temperature and other sampling rules.

    Raises NotFinite where the model's output is not.
    """
    kl = steered = 0.0
    texts = [_tape(pair.prompt, pair.steered, steer) for steer in (pair.steer, pair.base)]
    reading = Reading(runner, texts)
    yield from reading.open()
    try:
        while not reading.finished:
            start = texts[0].cached - len(pair.prompt) + 1
            mine, base = reading.read()
            # A token that is impossible under the model adds nothing; its difference of infinities would be NaN.
            kl += float((mine.exp() * (mine - base)).masked_fill(mine == -torch.inf, 0.0).sum(dim=-1).double().sum())
            steered += sum(one.logprob for one in _told(base, pair.steered, start))
            yield False
    finally:
        reading.close()
    (told,) = yield from score(runner, [(pair.prompt, pair.baseline)], pair.base)
    baseline = sum(one.logprob for one in told)
    # Before max() and min(), which would turn NaN into a number.
    if not all(map(math.isfinite, (kl, steered, baseline))):
        raise NotFinite("The steered and the unsteered text cannot be compared: the model's output is not finite.")
    steered_mean, baseline_mean = steered / len(pair.steered), baseline / len(pair.baseline)
    return Divergence(
        kl_per_token=max(0.0, kl / len(pair.steered)),
        logprob_under_baseline=steered_mean,
        perplexity_ratio=math.exp(min(LARGEST_EXPONENT, baseline_mean - steered_mean)),
    )


def score(
    runner: Runner, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], steer: Steer, top: int = 0
) -> Job[list[tuple[Likelihood, ...]]]:
    """texts: prompts with their continuations -> how likely each token of each continuation is, steered as if it were
    being generated, beside the `top` likeliest in its place."""
    scores: list[tuple[Likelihood, ...]] = []
    longest = max((len(prompt) + len(continuation) - 1 for prompt, continuation in texts), default=1)
    together = max(1, min(TOGETHER, runner.cache.places(longest)))
    # The first alone: where the others begin with the same prompt, they then share its keys and values.
    groups = [texts[:1], *(texts[i : i + together] for i in range(1, len(texts), together))]
    for group in groups:
        tapes = [_tape(prompt, continuation, steer) for prompt, continuation in group]
        told: list[list[Likelihood]] = [[] for _ in group]
        reading = Reading(runner, tapes)
        yield from reading.open()
        try:
            while not reading.finished:
                for mine, (_, continuation), logprobs in zip(told, group, reading.read(), strict=True):
                    mine += _told(logprobs, continuation, len(mine), top)
                yield False
        finally:
            reading.close()
        scores += map(tuple, told)
    return scores


def _tape(prompt: tuple[int, ...], text: tuple[int, ...], steer: Steer) -> Tape:
    """A text to read; nothing is asked of what follows its last token."""
    return Tape([*prompt, *text[:-1]], len(prompt), steer)


def _told(logprobs: Tensor, text: tuple[int, ...], start: int, top: int = 0) -> list[Likelihood]:
    """logprobs [tokens, vocab] of what comes at text[start] and after -> those of the tokens that came."""
    came = text[start : start + len(logprobs)]
    chosen = logprobs.gather(1, torch.tensor(came, dtype=torch.int64, device=logprobs.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
    tops = map(tuple, best.indices.tolist()), map(tuple, best.values.tolist())
    return [Likelihood(*each) for each in zip(came, chosen, *tops, strict=True)]
