"""What the engine works on: sequences of tokens, their parameters, the events that tell of them. No tensors here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.attention.layout import ChunkLayout
from server.errors import ServerError
from steering.types import UNSTEERED, SequenceSteering

PositionsName = Literal["generated", "prompt", "all"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled for one sequence, and where its text ends. temperature 0 is greedy; top_k 0, top_p 1,
    min_p 0, repetition_penalty 1, presence_penalty 0 and frequency_penalty 0 are off."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over the prompt and what has been generated
    presence_penalty: float = 0.0  # this one and the next over what has been generated
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids, each once, and what is added to their logits
    min_tokens: int = 0  # before so many nothing but max_new_tokens ends the text
    seed: int = 0
    choice: int = 0  # the index among the `n` choices: a stream of random numbers of its own under one seed
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False  # what has ended the text is its last part
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether a token's probability depends on the tokens before it in another way than through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class SteeringParams:
    """What steers one sequence: multipliers for loaded columns, and the tokens at which they act."""

    columns: SequenceSteering = UNSTEERED
    positions: PositionsName = "generated"


@dataclass(frozen=True)
class TokenLogprob:
    """The natural log-probability of a token under the model (steered as its sequence is, before any sampling rule),
    and those of the likeliest tokens in its place, best first."""

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()  # plain numbers, which the garbage collector need not look at


class ShareKey(NamedTuple):
    """In whose share of the engine a sequence is computed."""

    client: str  # who has shares with other clients; of a request without an API key the request
    request: str  # which has shares with the other requests of its client


OWN_SHARE = ShareKey("", "")


@dataclass(eq=False)
class Sequence:
    """One prompt and its continuation: generated token by token, or given and scored.

    Its keys and values lie in the blocks of its `block_table`: token i in block `block_table[i // block_size]`.
    The first `num_computed_tokens` tokens have theirs; the others are still to be computed.
    """

    # Set by whoever asks
    request_id: str  # whose sequences end together; no other request ever has this name
    index: int  # among the sequences of its request
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    steering_params: SteeringParams = field(default_factory=SteeringParams)
    stream: bool = False  # a TokenEvent for every token
    trace: bool = False  # a ColumnTrace for every token and column
    continuation: tuple[int, ...] | None = None  # scored instead of generated: "teacher forcing"
    share: ShareKey = OWN_SHARE  # as it is given, that of its own request
    # Set by the engine
    token_ids: list[int] = field(init=False)  # the prompt and what has been sampled, or is given, after it
    end_token_ids: frozenset[int] = field(default=frozenset(), init=False)  # with each of which its text ends
    # Scheduled in the same steps. A plain sequence: (itself,); a pair's leader: (itself, follower); a follower: ().
    lockstep: tuple["Sequence", ...] = field(init=False, repr=False)
    num_computed_tokens: int = field(default=0, init=False)
    steered: list[int] = field(default_factory=list, init=False)  # 1 for each computed token that was steered, else 0
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)  # of the continuation's scored tokens
    kl: float = field(default=0.0, init=False)  # sum over its tokens of KL(leader || follower), nats
    ended: bool = field(default=False, init=False)  # it is in no later step
    # Set by the block manager
    block_table: list[int] = field(default_factory=list, init=False)  # empty: the sequence does not run
    # For each token its id and what steered it
    cache_keys: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64), init=False, repr=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        # Nothing is asked of what follows a scored continuation's last token.
        self.token_ids = [*self.prompt_token_ids, *(self.continuation or ())[:-1]]
        self.lockstep = (self,)
        if self.share == OWN_SHARE:
            self.share = ShareKey(self.request_id, self.request_id)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_scored(self) -> bool:
        """Whether its continuation is given."""
        return self.continuation is not None

    @property
    def num_shareable(self) -> int:
        """How many leading tokens may come from the prefix cache: all but the last one; of a scored sequence all but
        the last prompt token."""
        return self.num_prompt_tokens - 1 if self.is_scored else len(self.token_ids) - 1

    def restart(self) -> None:
        """Forgets what has been computed for it: its blocks are gone."""
        self.num_computed_tokens = 0
        self.logprobs, self.kl = [], 0.0

    def follow(self, leader: "Sequence") -> None:
        """From now on it is computed in the leader's steps. Both have the same tokens."""
        self.lockstep, leader.lockstep = (), (leader, self)


@dataclass(frozen=True, eq=False)
class ScheduledChunk:
    """Compute the tokens start..end of a sequence in the next forward pass."""

    sequence: Sequence
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids[self.start : self.end]

    @property
    def layout(self) -> ChunkLayout:
        return ChunkLayout(self.sequence.block_table or None, self.start, self.end)

    @property
    def is_sampled(self) -> bool:
        """Whether a token is sampled after this chunk: it ends at the last known token, or its input token is still on
        the device (async scheduling)."""
        return not self.sequence.is_scored and self.end >= len(self.sequence.token_ids)

    @property
    def num_logits(self) -> int:
        """For how many of its tokens, the last ones, logits are wanted."""
        if self.sequence.is_scored:
            return max(0, self.end - max(self.start, self.sequence.num_prompt_tokens - 1))
        return int(self.is_sampled)

    @property
    def num_rows(self) -> int:
        """For how many of its tokens, the last ones, logits are computed: one at least, which says whether what was
        computed is finite."""
        return max(1, self.num_logits)


def steering_mask(positions: PositionsName, start: int, stop: int, num_prompt_tokens: int) -> NDArray[np.bool_]:
    """Which of the tokens start..stop of a sequence are steered.

    `generated` begins at the last prompt token: it is the one that produces the first new token.
    """
    index = np.arange(start, stop)
    if positions == "generated":
        return index >= num_prompt_tokens - 1
    if positions == "prompt":
        return index < num_prompt_tokens
    return np.ones(stop - start, dtype=np.bool_)


@dataclass(frozen=True)
class ColumnTrace:
    """What one column did to the activation from which a token came (steering.operators.Trace)."""

    attribute: str
    site: str
    gate: float
    strength: float  # multiplier x gate
    delta_norm: float
    cosine: float  # between what was added and the activation


@dataclass(frozen=True)
class SampledToken:
    """What one step sampled for one sequence."""

    token_id: int
    logprob: TokenLogprob | None = None
    trace: tuple[ColumnTrace, ...] = ()


@dataclass(frozen=True)
class ScoredTokens:
    """What one step says of a given continuation."""

    logprobs: tuple[TokenLogprob, ...]
    kl: float = 0.0  # sum over these tokens of KL(leader || follower), nats

    @property
    def finite(self) -> bool:
        """Minus infinity is a number here: a token that is impossible under the model."""
        numbers = [self.kl, *(each.logprob for each in self.logprobs)]
        return not any(np.isnan(numbers)) and np.inf not in numbers


@dataclass(frozen=True)
class StepOutput:
    """What one step gives one chunk."""

    steered: list[int]  # for each token whether it was steered; counted on the device, inside the steering hook
    sampled: SampledToken | None = None  # None: the chunk did not reach the end of its sequence
    scored: ScoredTokens | None = None
    finite: bool = True  # False: the logits are NaN or infinite, and nothing that was computed means anything


@dataclass(frozen=True)
class Timing:
    """Milliseconds since the request was submitted."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True)
class Progress:
    """What a sequence would end with if it ended with this token."""

    steered_tokens: int
    timing: Timing


@dataclass(frozen=True)
class TokenEvent:
    """One token of a sequence that streams, and the text that is certain by now: none while a character is unfinished
    or a stop string may have begun."""

    sequence: Sequence
    index: int  # of the token among the sequence's new ones
    token: SampledToken
    text: str
    progress: Progress | None = None  # where a stop string may end the sequence that the engine does not look for


@dataclass(frozen=True)
class Finished:
    """The last event of a sequence that was generated."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    steered_tokens: int
    timing: Timing
    tokens: tuple[SampledToken, ...] = ()  # kept only where logprobs or a trace were asked for


@dataclass(frozen=True)
class Scored:
    """The last event of a sequence whose continuation was given."""

    sequence: Sequence
    logprobs: tuple[TokenLogprob, ...]
    kl: float


@dataclass(frozen=True)
class Failed:
    """A sequence's last event, instead of the others."""

    sequence: Sequence
    error: ServerError


Event = TokenEvent | Finished | Scored | Failed
EventSink = Callable[[Event], None]  # called on the engine's thread; must return at once


@dataclass(frozen=True)
class EngineStatus:
    """The engine at one moment."""

    running: int  # sequences that are generated
    scoring: int  # sequences whose continuation is given, running or waiting
    waiting: int
    used_blocks: int  # of the KV cache, by sequences that run
    num_blocks: int
    block_size: int  # tokens
    cached_tokens: int  # found in the cache instead of being computed, since the start
    queried_tokens: int  # looked for there
    preemptions: int
    threads: int  # of the CPU that a step computes with


@dataclass
class EngineStats:
    """Counted by the engine; read by anyone."""

    steps: int = 0
    tokens: int = 0  # sampled
    scored_tokens: int = 0
    computed_tokens: int = 0  # through the model, prompts included
    sequences: int = 0  # admitted
    failed_steps: int = 0
    largest_batch: int = 0  # sequences in one step


def unique_requests(sequences: Iterable[Sequence]) -> list[str]:
    """The ids of their requests, each once, in order."""
    return list(dict.fromkeys(sequence.request_id for sequence in sequences))
