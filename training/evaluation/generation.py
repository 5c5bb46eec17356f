"""Judged generations: continuations of many prompts under several arms in one batch, and a judge's verdicts."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from math import exp
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from steering.chat_template import ChatTemplate
from steering.hook import steered
from steering.types import Column, Positions
from training.activations.tokenization import Encoded, check_ids, encode_prompt, pad_left
from training.data.loaders import messages_field
from training.data.rows import Row, check_fields, collect, read_rows, split_field, text_field
from training.data.samples import Form, Split, Turn, show_turns
from training.errors import DataError, TrainingError
from training.evaluation.choices import log_likelihoods
from training.evaluation.results import Arm, ArmResult, Estimate, Evaluation, wilson
from training.progress import progress_bar

Judge = Callable[[str, str], Mapping[str, bool | None]]
"""(prompt, generated text) -> metric -> does it hold; None where the metric does not apply. A conversation's prompt is
what the user says, or, where there is more, a line `role: content` for each turn."""


FIELDS = ("prompt", "messages", "split", "group", "attribute", "completion", "label")
"""Of a file of prompts, which may be a training file: all but the first three say nothing here."""

Asked = str | tuple[Turn, ...]
"""A text to continue, or a conversation to answer."""


@dataclass(frozen=True)
class Prompt:
    asked: Asked
    split: Split | None
    """None belongs to every split."""


def load_judge(name: str) -> Judge:
    """The function "module:function", modules of the working directory included. Raises TrainingError."""
    module, found, function = name.partition(":")
    if not (found and module and function):
        raise TrainingError(f"A judge is named as module:function, got {name!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        judge: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"The judge {name!r} cannot be found: {error}.") from None
    if not callable(judge):
        raise TrainingError(f"The judge {name!r} is a {type(judge).__name__}, not a function.")
    return cast(Judge, judge)


def judge_key(judge: Judge) -> str:
    """The judge's name and a hash of the file that it is defined in."""
    module = sys.modules.get(judge.__module__)
    file = getattr(module, "__file__", None)
    source = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return f"{judge.__module__}:{getattr(judge, '__qualname__', '')} {source}"


def load_prompts(path: Path) -> list[Prompt]:
    """JSON lines of `{"prompt" | "messages", "split"?}`. Raises DataError with file and line."""

    def convert(row: Row) -> list[Prompt]:
        check_fields(row, FIELDS)
        return [Prompt(_asked(row), split_field(row))]

    prompts = collect(str(path), partial(read_rows, path), convert)
    if not prompts:
        raise DataError(f"{path} holds no prompts.")
    return prompts


def _asked(row: Row) -> Asked:
    """Of `messages` without the assistant's last turn, which is the answer of a training file."""
    if "messages" not in row.fields:
        return text_field(row, "prompt")
    if "prompt" in row.fields:
        raise DataError(f'{row.where}: "prompt" and "messages" are two ways to say one thing: give one.')
    turns = messages_field(row, least=1)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    if not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise DataError(f'{row.where}: "messages" must have a turn of the user, which is not empty.')
    return tuple(turns)


def prompts_of(prompts: Sequence[Prompt], split: Split, limit: int | None = None) -> list[Asked]:
    """The (first `limit`) prompts of a split. Raises DataError where there is none."""
    chosen = [prompt.asked for prompt in prompts if prompt.split in (None, split)]
    if not chosen:
        raise DataError(f"There is no prompt of the {split} split.")
    return chosen[:limit]


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
    progress: bool = False,
) -> list[Continuation]:
    """Continue every prompt `sampling.samples` times in every arm; ordered by arm, prompt, sample.

    `chat`: renders conversations. Raises DataError.

    Sample k of a prompt uses the same random numbers in every arm and whatever the batch, so that arms differ by
    steering alone. With `generated` positions all rows of a prompt share one prefill.
    """
    encoded = [
        encode_prompt(tokenizer, asked) if isinstance(asked, str) else encode_prompt(tokenizer, "", asked, chat)
        for asked in prompts
    ]
    check_ids(model, tokenizer, encoded)
    limit = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - sampling.max_new_tokens
    for asked, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) <= limit:
            raise DataError(
                f"The prompt {_shown(asked)[:80]!r} has {len(ids)} tokens; with {sampling.max_new_tokens} new ones the "
                f"model takes 1 to {max(0, limit)}."
            )
    strengths = torch.tensor([arm.multipliers(columns) for arm in arms]).view(len(arms), len(columns))
    seeded = torch.Generator().manual_seed(sampling.seed)
    noise = torch.rand(len(prompts), sampling.samples, sampling.max_new_tokens, generator=seeded, dtype=torch.float64)
    batch = _Decoder(model, columns, positions, sampling, end_tokens(model, tokenizer))
    results: list[tuple[_SequenceId, Continuation]] = []
    per_prompt = len(arms) * sampling.samples
    with progress_bar("generate", per_prompt * len(prompts), "texts", shown=progress) as advance:
        for chosen in _prompt_batches(encoded, max(1, max_rows // per_prompt)):
            rows = [_SequenceId(p, a, s) for p in chosen for a in range(len(arms)) for s in range(sampling.samples)]
            tokens = batch.run(
                [encoded[p] for p in chosen],
                strengths[[row.arm for row in rows]],
                torch.stack([noise[row.prompt, row.sample] for row in rows]),
            )
            costs = _base_costs(model, [encoded[row.prompt] for row in rows], tokens, max_rows)
            for row, ids, nll in zip(rows, tokens, costs, strict=True):
                finished = ids[-1] in batch.ends
                text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
                results.append(
                    (row, Continuation(arms[row.arm].name, row.prompt, row.sample, ids, text, finished, nll))
                )
            advance(len(rows))
    return [text for _, text in sorted(results, key=lambda pair: (pair[0].arm, pair[0].prompt, pair[0].sample))]


def evaluate_generations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Asked],
    judge: Judge,
    columns: Sequence[Column],
    arms: Sequence[Arm],
    sampling: Sampling,
    *,
    chat: ChatTemplate | None = None,
    positions: Positions = Positions.GENERATED,
    max_rows: int = 128,
    progress: bool = False,
) -> tuple[Evaluation, list[Continuation]]:
    """Generate in every arm and judge: the rate of each metric where it applies, with a Wilson interval, and the
    perplexity of the text under the unsteered model. The texts come along."""
    if not prompts:
        raise DataError("There are no prompts to evaluate.")
    texts = generate(
        model, tokenizer, prompts, columns, arms, sampling, chat=chat, positions=positions, max_rows=max_rows,
        progress=progress,
    )  # fmt: skip
    results: list[ArmResult] = []
    for index, arm in enumerate(arms):
        size = len(texts) // len(arms)
        own = texts[index * size : (index + 1) * size]
        perplexity = exp(min(700.0, sum(text.nll for text in own) / sum(len(text.token_ids) for text in own)))
        first = results[0].perplexity if results else perplexity
        results.append(
            ArmResult(
                arm.name,
                dict(arm.attributes),
                judged_rates([_verdict(judge, _shown(prompts[text.prompt]), text.text) for text in own]),
                perplexity,
                perplexity / first if first else None,
            )
        )
    form = Form.PLAIN if all(isinstance(asked, str) for asked in prompts) else Form.CHAT
    settings = {"prompts": len(prompts), "form": form.value, "positions": positions.value, **asdict(sampling)}
    return Evaluation("generation", tuple(results), settings), texts


def _shown(asked: Asked) -> str:
    return asked if isinstance(asked, str) else show_turns(asked)


def judged_rates(verdicts: Sequence[Mapping[str, bool | None]]) -> dict[str, Estimate]:
    """Per metric, how often it holds among the verdicts where it applies."""
    rates = {}
    for name in dict.fromkeys(name for verdict in verdicts for name in verdict):
        values = [bool(v) for verdict in verdicts if (v := verdict.get(name)) is not None]
        rates[name] = wilson(sum(values), len(values))
    return rates


def _verdict(judge: Judge, prompt: str, text: str) -> Mapping[str, bool | None]:
    try:
        return judge(prompt, text)
    except Exception as error:
        raise TrainingError(f"The judge failed on an answer to {prompt[-80:]!r}: {error!r}.") from error


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
        while len(alive) and step < self.sampling.max_new_tokens:
            with self._steered(strengths[alive]):
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


def _prompt_batches(encoded: Sequence[tuple[int, ...]], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]
