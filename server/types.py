"""What the service takes and returns. Schemas make the first from request bodies; formatting makes response bodies of
the second, which are the engine's events (numbers and text) with what the service knows about them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.divergence import Divergence
from server.engine.sequence import Finished, PositionsName, SamplingParams, TokenEvent, TokenLogprob


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint (None: the active one) and multipliers for its attributes (None: its defaults)."""

    checkpoint: str | None = None
    attributes: Mapping[str, float] | None = None
    param: str = ""  # for errors: the prefix of its fields in the request, as in "steering.0."
    named_by: str = ""  # for errors: the field that names the checkpoint; empty: `param` and "checkpoint"


@dataclass(frozen=True)
class Arm:
    """One of the ways in which a request's prompts are answered. Without checkpoints: unsteered."""

    name: str
    checkpoints: tuple[CheckpointRef, ...]


STEERED, BASELINE = Arm("steered", (CheckpointRef(),)), Arm("baseline", ())


@dataclass(frozen=True)
class ChatOptions:
    """How messages become a text."""

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of the chat template
    add_generation_prompt: bool | None = None  # None: unless the last message is continued
    continue_final_message: bool = False


@dataclass(frozen=True)
class GenerateParams:
    """A request to generate, from any route. Exactly one of `prompts` and `messages` is given."""

    prompts: tuple[str | tuple[int, ...], ...] = ()  # texts, or their token ids
    messages: tuple[Mapping[str, Any], ...] = ()
    chat: ChatOptions = field(default_factory=ChatOptions)  # for `messages`
    add_special_tokens: bool | None = None  # None: before a text that does not begin with them
    single: bool = True  # for errors: the prompt was not in a list
    arms: tuple[Arm, ...] = (STEERED,)  # they share prompts, seeds and sampling
    reference: int = 0  # index of the arm that the others are compared with
    positions: PositionsName | None = None  # None: the checkpoint's own
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None  # None: random
    n: int = 1  # texts for each prompt and arm
    trace: bool = False
    echo: bool = False  # return the prompts too, with log-probabilities under the first arm where `sampling` asks


@dataclass(frozen=True)
class ScoreParams:
    """A request for the log-likelihoods of given continuations of a prompt."""

    prompt: str
    continuations: tuple[str, ...]
    checkpoints: tuple[CheckpointRef, ...] = (CheckpointRef(),)
    positions: PositionsName | None = None
    add_special_tokens: bool | None = None  # None: where the prompt does not begin with them


@dataclass(frozen=True)
class TokenizeParams:
    """A request for the ids that a text or a conversation becomes. Exactly one of both is given."""

    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    chat: ChatOptions = field(default_factory=ChatOptions)
    add_special_tokens: bool | None = None


@dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer, as far as a client needs to know it."""

    tokenizer_class: str
    vocab_size: int
    special_tokens: Mapping[str, str]  # by transformers' names: bos_token, eos_token, ...
    chat_template: str | None  # Jinja; None: there is none that can be used


@dataclass(frozen=True)
class AppliedCheckpoint:
    """A checkpoint version that steered a text, and the multipliers that it did it with."""

    checkpoint: str
    version: str
    sha256: str
    attributes: Mapping[str, float]


@dataclass(frozen=True)
class ArmResult:
    """One arm's texts: prompts in order, each with its `n` texts."""

    name: str
    checkpoints: tuple[AppliedCheckpoint, ...]
    texts: tuple[Finished, ...]
    divergences: tuple[Divergence, ...] | None  # of each text from the reference arm's; None for that arm itself


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt, and the log-probabilities of its tokens from the second one on (before the first there is nothing)."""

    prompt: str | tuple[int, ...]  # as the request gave it
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None  # None: not asked for


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A token of a text that streams."""

    arm: str
    index: int  # of the text among the arm's
    event: TokenEvent


@dataclass(frozen=True)
class GenerateResult:
    """All texts of a request. The arms are in the order of the request."""

    id: str
    created: int  # Unix time, seconds
    model: str
    arms: tuple[ArmResult, ...]
    reference: int = 0  # index of the arm that the others are compared with
    prompts: tuple[EchoedPrompt, ...] = ()  # where the request asks for them


# A streaming request: each item holds everything that has come since the item before. The last one is the result.
ResultStream = AsyncIterator[Sequence[EchoedPrompt | TokenChunk | GenerateResult]]


@dataclass(frozen=True)
class ScoreResult:
    """The log-likelihoods of the tokens of each continuation, in the order of the request."""

    id: str
    created: int  # Unix time, seconds
    model: str
    continuations: tuple[tuple[TokenLogprob, ...], ...]
    checkpoints: tuple[AppliedCheckpoint, ...]
    positions: PositionsName
