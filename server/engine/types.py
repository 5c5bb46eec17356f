"""What crosses the engine's boundary. No tensors here."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from server.errors import ServerError
from steering.types import UNSTEERED, RowSteering

PositionsName = Literal["generated", "prompt", "all"]
FinishReason = Literal["stop", "length", "cancelled"]
T = TypeVar("T")
# Work in parts, one between two steps each; yields whether it waits for space that running rows will free.
Job = Generator[bool, None, T]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn for one row. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    choice: int = 0  # the index among the `n` choices: an own stream of random numbers under one seed
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Steer:
    """What one row carries: multipliers for loaded columns, and at which tokens they act."""

    columns: RowSteering = UNSTEERED
    positions: PositionsName = "generated"


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence to generate."""

    request: str  # whose rows end together; no other request ever has this name
    index: int  # position among the request's rows
    tokens: tuple[int, ...]
    sampling: Sampling
    steer: Steer = field(default_factory=Steer)
    stream: bool = False  # a Piece for every token
    trace: bool = False  # a Touch for every token and column


@dataclass(frozen=True)
class Likelihood:
    """The natural log-probability of a text's token under the model (steered as the row is, before any sampling rule),
    beside those of the likeliest tokens in its place, best first."""

    token: int
    logprob: float
    top_tokens: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()  # plain numbers, which the garbage collector need not look at


@dataclass(frozen=True)
class Touch:
    """What one column did to the activation from which a token came (steering.operators.Trace)."""

    attribute: str
    site: str
    gate: float
    strength: float  # multiplier x gate
    delta_norm: float
    cosine: float  # between what was added and the activation


@dataclass(frozen=True)
class Draw:
    """What was drawn for one row."""

    token: int
    finite: bool = True  # False: the logits were NaN or infinite, and the token means nothing
    likelihood: Likelihood | None = None
    touches: tuple[Touch, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Milliseconds since the request was submitted."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True)
class Finished:
    """A row's last event."""

    row: Row
    tokens: tuple[int, ...]
    text: str
    reason: FinishReason
    steered_tokens: int
    timing: Timing
    draws: tuple[Draw, ...] = ()  # kept only where logprobs or a trace were asked for


@dataclass(frozen=True)
class Failed:
    """The row's last event, instead of Finished."""

    row: Row
    error: ServerError


@dataclass(frozen=True)
class Piece:
    """One token of a row that streams, and the text that is certain by now: none while a character is unfinished or a
    stop string may have begun."""

    row: Row
    index: int  # of the token among the row's new ones
    draw: Draw
    text: str


Event = Piece | Finished | Failed
Sink = Callable[[Event], None]  # called on the engine's thread; must return at once


@dataclass(frozen=True)
class Pair:
    """A continuation of a prompt, beside that of a reference (mostly the unsteered one), to be compared."""

    prompt: tuple[int, ...]
    steered: tuple[int, ...]
    baseline: tuple[int, ...]
    steer: Steer
    base: Steer = Steer()


@dataclass(frozen=True)
class Divergence:
    """How far steering moved the model on one pair, from teacher-forced passes (nats, natural logarithms)."""

    kl_per_token: float  # mean over the steered text of KL(steered || reference)
    logprob_under_baseline: float  # mean log-probability per token of the steered text, reference model
    perplexity_ratio: float  # reference model: perplexity of the steered text / of the reference's text


@dataclass(frozen=True)
class Load:
    """The engine at one moment."""

    running: int  # rows
    waiting: int
    used_tokens: int  # of the cache, by rows that run
    tokens: int  # that the cache has room for
    shared_tokens: int  # taken over instead of computed, since the start
    preemptions: int
    threads: int  # of the CPU that a step computes with


@dataclass
class EngineStats:
    """Counted by the engine; read by anyone."""

    steps: int = 0
    tokens: int = 0  # drawn
    computed_tokens: int = 0  # through the model, prompts included
    rows: int = 0  # rows admitted
    failed_steps: int = 0
    largest_batch: int = 0  # rows in one step
