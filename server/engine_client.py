"""What the service asks of the engine and its checkpoints, in its own process (`server/engine_core.py`) or in another
one (`server/process/`). Everything that crosses this line is plain data."""

from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from server.engine.divergence import Divergence
from server.engine.sequence import (
    OWN_SHARE,
    EngineStats,
    EngineStatus,
    Event,
    PositionsName,
    SamplingParams,
    Sequence,
    ShareKey,
    SteeringParams,
    TokenLogprob,
)
from server.types import AppliedCheckpoint, CheckpointRef
from steering.checkpoint_config import CheckpointConfig

TokenIds = tuple[int, ...]
Form = Literal["chat", "plain"]
# Called on the event loop of whoever submitted, after `submit` has returned. Every sequence gets exactly one last
# event; before it, of those that stream, a TokenEvent for each token.
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class EngineFacts:
    """What does not change while an engine runs."""

    max_pair_tokens: int  # how many tokens each of two texts may have that are compared
    context: int  # how many a text may have
    vocab: int  # tokens that the model knows
    eos: frozenset[int]
    created: int  # Unix time at which it was loaded, seconds
    adapter: str | None = None  # the LoRA adapter that was merged into the model's weights
    pid: int | None = None  # of the engine's process


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what holds for every text that continues it."""

    token_ids: TokenIds
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class EngineRequest:
    """Texts to be generated. Their sequences are in the order prompt, choice, arm:
    index = (prompt * n + choice) * arms + arm."""

    id: str  # no other request ever has it
    prompts: tuple[Prompt, ...]
    arms: tuple[tuple[CheckpointRef, ...], ...]
    sampling: SamplingParams  # but for what `Prompt` has, and `choice`
    n: int = 1
    positions: PositionsName | None = None  # None: the checkpoint's own
    form: Form | None = None  # of what was tokenized
    stream: bool = False
    trace: bool = False
    echo_logprobs: bool = False  # also of the prompts, under the first arm
    share: ShareKey = OWN_SHARE

    def sequences(self, steering: abc.Sequence[SteeringParams]) -> list[Sequence]:
        """`steering`: of each arm."""
        made: list[Sequence] = []
        for prompt in self.prompts:
            for choice in range(self.n):
                sampling = replace(self.sampling, max_new_tokens=prompt.max_new_tokens, seed=prompt.seed, choice=choice)
                for arm in steering:
                    one = Sequence(
                        self.id, len(made), prompt.token_ids, sampling, arm, self.stream, self.trace, share=self.share
                    )
                    made.append(one)
        return made


@dataclass(frozen=True)
class AppliedSteering:
    """What an arm's names and multipliers turned out to be."""

    checkpoints: tuple[AppliedCheckpoint, ...]
    positions: PositionsName


@dataclass(frozen=True)
class Submitted:
    """A request that the engine has taken."""

    sequences: list[Sequence]
    arms: tuple[AppliedSteering, ...]


@dataclass(frozen=True)
class ScoreRequest:
    """Continuations of prompts, to be scored as if they were being generated."""

    texts: tuple[tuple[TokenIds, TokenIds], ...]
    checkpoints: tuple[CheckpointRef, ...]
    positions: PositionsName | None = None
    share: ShareKey = OWN_SHARE


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of each continuation's tokens."""

    continuations: tuple[tuple[TokenLogprob, ...], ...]
    steering: AppliedSteering


@dataclass(frozen=True)
class CheckpointInfo:
    """A loaded checkpoint, as clients see it."""

    name: str
    version: str
    sha256: str
    created: int  # Unix time at which it was loaded, seconds
    defaults: Mapping[str, float]  # attribute -> default multiplier

    @property
    def label(self) -> str:
        """NAME@VERSION."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class CheckpointEntry:
    """One complete checkpoint folder."""

    name: str
    version: str
    config: CheckpointConfig | None  # of what is served, where it is loaded; None: damaged
    problem: str | None  # why what is in the folder cannot be loaded on this model
    loaded: bool
    changed: bool  # loaded, and the folder holds another one by now
    active: bool


@dataclass(frozen=True)
class GateSample:
    """What an attribute did to the tokens that were looked at; buckets are Prometheus', each with its bound."""

    gates: list[tuple[str, int]]
    gates_total: float
    delta_norms: list[tuple[str, int]]
    delta_norms_total: float
    saturated: int


@dataclass(frozen=True)
class EngineSnapshot:
    """The engine and its checkpoints at one moment."""

    trouble: str | None  # why no request can be served now
    stats: EngineStats
    status: EngineStatus
    open_sequences: int  # that have been submitted and not ended
    pins: int  # uses of loaded checkpoints by requests that have not ended
    loaded: list[CheckpointInfo]  # by name and version
    active: CheckpointInfo | None
    loads: int = 0  # since the start: checkpoints brought to the device
    swaps: int = 0  # how often requests that name none got another checkpoint than before
    gates: Mapping[str, Mapping[str, GateSample]] = field(default_factory=dict)  # by checkpoint and attribute


class EngineClient(Protocol):
    """Everything is called on an event loop, but `close`, which any thread may call, and `stop`, which blocks. Errors
    are ServerErrors; EngineDown where the engine is gone."""

    facts: EngineFacts

    @property
    def failure(self) -> str | None:
        """Why no request will be served any more, though nobody has stopped the engine: this process has to end."""
        ...

    async def submit(self, request: EngineRequest, on_event: OnEvent) -> Submitted:
        """Queue the sequences of a request. Its checkpoints stay loaded until `close`. Cancelled, or where it raises,
        nothing has been submitted.

        Raises UnknownCheckpoint, UnusableCheckpoint, WrongModel, UnknownModel, UnknownAttribute, InvalidField,
        QueueFull, EngineDown, PromptTooLong.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End the request's sequences before the next step is begun; a request that has ended is left alone."""
        ...

    def close(self, request_id: str) -> None:
        """Nobody asks for anything of this request any more."""
        ...

    async def prompt_logprobs(self, request_id: str) -> list[tuple[TokenLogprob, ...]]:
        """Of the prompts with more than one token, where the request asked for them; once."""
        ...

    async def compare(
        self, request_id: str, steered: int, reference: int, texts: tuple[TokenIds, TokenIds]
    ) -> Divergence:
        """How far two finished texts of a request are from each other. `steered`, `reference`: their sequences'
        indices, `texts`: their new tokens."""
        ...

    async def score(self, request: ScoreRequest) -> Scores:
        """Raises what `submit` raises."""
        ...

    async def checkpoints(self, name: str | None) -> list[CheckpointEntry]:
        """Every complete folder of checkpoints, or those of one name."""
        ...

    async def find_checkpoint(self, name: str) -> CheckpointInfo | None:
        """What NAME or NAME@VERSION means now; None: it is not loaded."""
        ...

    async def reload(self, name: str, version: str | None, activate: bool) -> CheckpointInfo:
        """See `Registry.reload`."""
        ...

    async def unload(self, name: str, version: str | None) -> list[str]:
        """See `Registry.unload`."""
        ...

    async def snapshot(self) -> EngineSnapshot: ...

    def drain(self) -> None:
        """Take no new requests, and go on with those there are until `stop`."""
        ...

    def stop(self) -> None:
        """Stop; whatever is unfinished fails with a message."""
        ...


def why_none_is_active(entries: list[CheckpointEntry]) -> str:
    """What to do about it: the sentence for the log and for GET /checkpoints."""
    names = list(dict.fromkeys(entry.name for entry in entries if not entry.problem))
    if names:
        return (
            f"No checkpoint is active, so requests that name none are not steered. There are {', '.join(names)}: "
            f"POST /checkpoints/{names[0]}/activate makes one active, and so does --checkpoint {names[0]} "
            "(MATSTEER_CHECKPOINT) at the start."
        )
    if entries:
        return "No checkpoint is active, so nothing is steered: none of those in the folder can be used on this model."
    return (
        "There is no checkpoint, so nothing is steered: `matsteer train` and `matsteer checkpoints import` make one, "
        "and --checkpoints (MATSTEER_CHECKPOINTS) names its folder."
    )
