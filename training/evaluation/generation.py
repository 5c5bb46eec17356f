"""Continuations of many prompts under several arms in one batch."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from steering.chat_template import ChatTemplate
from steering.column import Column
from steering.hook import steered
from steering.types import Positions
from training.activations.tokenization import Encoded, check_ids, encode_prompt, pad_left
from training.data.samples import Turn, show_turns
from training.errors import DataError, TrainingError
from training.evaluation.kept import NOTHING, Kept
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.results import Arm
from training.progress import Advance

Asked = str | tuple[Turn, ...]
"""A text to continue, or a conversation to answer."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt. Temperature 0 is greedy."""

    temperature: float = 1.0
    max_new_tokens: int = 64
    samples: int = 1
    """Continuations of each prompt in each arm."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise TrainingError(f"temperature must be between 0 and 100, got {self.temperature}.")
        if self.max_new_tokens < 1 or self.samples < 1:
            raise TrainingError(
                f"max_new_tokens and samples must be at least 1, got {self.max_new_tokens} and {self.samples}."
            )


@dataclass(frozen=True)
class Continuation:
    """One generated text. `nll` is the sum of its tokens' negative log-likelihoods without steering."""

    arm: str
    prompt: int  # index of the prompt
    sample: int
    token_ids: tuple[int, ...]
    text: str
    finished: bool  # it ended with an end-of-text token, which is the last of token_ids
    nll: float
    verdict: Mapping[str, bool | None] = field(default_factory=dict)
    """A judge's."""
    asked: str = ""
    """The prompt, for people, once it was judged."""
    attribute: str = ""
    """Of the data that the prompt is from, if any."""


@dataclass(frozen=True)
class _SequenceId:
    prompt: int
    arm: int
    sample: int


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Asked],
    columns: Sequence[Column],
    arms: Sequence[Arm],
    sampling: Sampling,
    *,
    chat: ChatTemplate | None = None,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 128,
    advance: Advance = lambda _: None,
    kept: Kept = NOTHING,
) -> list[Continuation]:
    """Continue every prompt `sampling.samples` times in every arm; ordered by arm, prompt, sample.

    `chat`: renders conversations. `kept`: where texts are written as they come, and from where an interrupted call goes
    on. `advance` is told how many texts there are now. Raises DataError.

    Sample k of a prompt uses the same random numbers in every arm and whatever the batch, so that arms differ by
    steering alone. With `generated` positions all rows of a prompt share one prefill.
    """
    encoded = [encoded_prompt(tokenizer, asked, chat) for asked in prompts]
    check_ids(model, tokenizer, encoded)
    limit = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - sampling.max_new_tokens
    for asked, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) <= limit:
            raise DataError(
                f"The prompt {shown(asked)[:80]!r} has {len(ids)} tokens; with {sampling.max_new_tokens} new ones the "
                f"model takes 1 to {max(0, limit)}."
            )
    strengths = torch.tensor([arm.multipliers(columns) for arm in arms]).view(len(arms), len(columns))
    seeded = torch.Generator().manual_seed(sampling.seed)
    noise = torch.rand(len(prompts), sampling.samples, sampling.max_new_tokens, generator=seeded, dtype=torch.float64)
    batch = _Decoder(model, columns, positions, sampling, end_tokens(model, tokenizer))
    per_prompt = len(arms) * sampling.samples
    store = kept.about("texts", encoded, asdict(sampling), positions.value)
    results = {
        _SequenceId(**row["id"]): Continuation(**{**row["text"], "token_ids": tuple(row["text"]["token_ids"])})
        for row in store.read()
    }
    texts = Counter(id.prompt for id in results)
    written = {prompt for prompt, count in texts.items() if count == per_prompt}  # not where writing was cut short
    advance(per_prompt * len(written))
    for chosen in _prompt_batches(encoded, max(1, max_rows // per_prompt), written):
        rows = [_SequenceId(p, a, s) for p in chosen for a in range(len(arms)) for s in range(sampling.samples)]
        tokens = batch.run(
            [encoded[p] for p in chosen],
            strengths[[row.arm for row in rows]],
            torch.stack([noise[row.prompt, row.sample] for row in rows]),
        )
        costs = _base_costs(model, [encoded[row.prompt] for row in rows], tokens, max_rows)
        found = {}
        for id, ids, nll in zip(rows, tokens, costs, strict=True):
            finished = ids[-1] in batch.ends
            said = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            found[id] = Continuation(arms[id.arm].name, id.prompt, id.sample, ids, said, finished, nll)
        results |= found
        store.add({"id": asdict(id), "text": asdict(one)} for id, one in found.items())
        advance(len(rows))
    return [results[id] for id in sorted(results, key=lambda id: (id.arm, id.prompt, id.sample))]


def encoded_prompt(tokenizer: Any, asked: Asked, chat: ChatTemplate | None) -> tuple[int, ...]:
    """As `generate` takes it. Raises DataError."""
    return encode_prompt(tokenizer, asked) if isinstance(asked, str) else encode_prompt(tokenizer, "", asked, chat)


def shown(asked: Asked) -> str:
    """For people and judges."""
    return asked if isinstance(asked, str) else show_turns(asked)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a text for this model."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(found)


@dataclass(frozen=True)
class _Decoder:
    """Decodes the rows of some prompts together."""

    model: Any
    columns: Sequence[Column]
    positions: Positions
    sampling: Sampling
    ends: frozenset[int]

    def run(self, prompts: Sequence[tuple[int, ...]], strengths: Tensor, noise: Tensor) -> list[tuple[int, ...]]:
        """Prompts [P], strengths [P * n, columns] and noise [P * n, steps], the rows of a prompt side by side."""
        device = self.model.device
        copies = len(strengths) // len(prompts)
        ids, mask = pad_left(prompts, device)
        shared = self.positions is Positions.GENERATED
        cache: Any = None
        if shared and ids.shape[1] > 1:
            cache = self._prefill(ids[:, :-1], mask[:, :-1])
            cache.batch_repeat_interleave(copies)
        ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
        fed = ids[:, -1:] if shared else ids
        written: list[list[int]] = [[] for _ in range(len(strengths))]
        alive = torch.arange(len(strengths))
        step = 0
        with self._steered(strengths) as steering:
            while len(alive) and step < self.sampling.max_new_tokens:
                # Leaving the loop regroups the batch once half of its rows have ended.
                while step < self.sampling.max_new_tokens:
                    at = (mask.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
                    output = self.model(
                        input_ids=fed, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True
                    )
                    cache = output.past_key_values
                    chosen = self._choose(output.logits[:, -1], noise[alive, step])
                    fed, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                    step += 1
                    going = self._write(written, alive, chosen.tolist())
                    if not going or (shared and 2 * len(going) <= len(alive)):
                        break
                kept = torch.tensor(going, dtype=torch.int64)
                alive = alive[kept]
                if len(kept) and len(kept) < len(mask):
                    cache.batch_select_indices(kept.to(device))
                    fed, mask = fed[kept.to(device)], mask[kept.to(device)]
                    if steering is not None:
                        steering.keep(going)
        return [tuple(tokens) for tokens in written]

    def _write(self, written: list[list[int]], alive: Tensor, chosen: list[int]) -> list[int]:
        """Append the tokens of the rows that have not ended; the rows of the batch that go on."""
        going = []
        for index, (row, token) in enumerate(zip(alive.tolist(), chosen, strict=True)):
            if written[row] and written[row][-1] in self.ends:
                continue
            written[row].append(token)
            if token not in self.ends:
                going.append(index)
        return going

    def _prefill(self, ids: Tensor, mask: Tensor) -> Any:
        at = (mask.cumsum(1) - 1).clamp_min(0)
        # A row of pads alone would attend to nothing; its first token lets it attend to itself.
        mask = torch.where((mask.sum(1, keepdim=True) == 0), torch.ones_like(mask), mask)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=at, use_cache=True).past_key_values

    def _steered(self, strengths: Tensor) -> Any:
        if not self.columns or not bool(strengths.any()):
            return nullcontext()
        return steered(self.model, self.columns, strengths.to(self.model.device), positions=self.positions)

    def _choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        shares = (logits.float() / self.sampling.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        # Rounding may leave the last sum under 1: the draw is scaled by it, never past the vocabulary.
        draw = noise.to(shares.device)[:, None] * shares[:, -1:]
        return torch.searchsorted(shares, draw, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def _base_costs(
    model: Any, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]], max_rows: int
) -> list[float]:
    rows = [Encoded(p + a, len(p) - 1, len(p) + len(a) - 1) for p, a in zip(prompts, answers, strict=True)]
    return [-float(scores.sum()) for scores in log_likelihoods(model, rows, max_rows=max_rows)]


def _prompt_batches(encoded: Sequence[tuple[int, ...]], size: int, but: Collection[int]) -> Iterator[list[int]]:
    order = sorted((i for i in range(len(encoded)) if i not in but), key=lambda i: (len(encoded[i]), i))
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]
