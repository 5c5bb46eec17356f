"""What goes into the service and what comes out: plain dataclasses, for HTTP and the terminal alike."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from server.engine.types import FinishReason, PositionsName, Sampling, Timing, Touch


@dataclass(frozen=True)
class Use:
    """A checkpoint (None: the active one) and multipliers for its attributes (None: its defaults)."""

    checkpoint: str | None = None
    attributes: Mapping[str, float] | None = None
    param: str = ""  # where in the request it stands, as in "steering.0."; for errors


@dataclass(frozen=True)
class Ask:
    """One request to generate. Exactly one of `prompts` and `messages` is given."""

    prompts: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    single: bool = True  # the prompt came alone, not in a list; for errors
    uses: tuple[Use, ...] = (Use(),)
    positions: PositionsName | None = None  # None: as the checkpoint says
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None  # None: one is drawn
    n: int = 1
    baseline: bool = False
    trace: bool = False


@dataclass(frozen=True)
class Part:
    """A checkpoint that took part in the steering of a row."""

    checkpoint: str
    version: str
    sha256: str
    attributes: Mapping[str, float]


@dataclass(frozen=True)
class SteeringReport:
    """What steered a row. `steered_tokens` was counted on the device, inside the hook."""

    parts: tuple[Part, ...]
    positions: PositionsName
    steered_tokens: int


@dataclass(frozen=True)
class Spelled:
    """A token with its text and log-probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class Spoken:
    """A generated token's log-probability beside the likeliest alternatives, best first."""

    chosen: Spelled
    top: tuple[Spelled, ...]


@dataclass(frozen=True)
class Traced:
    """A generated token, and what each attribute's columns did to the activation from which it came."""

    token_id: int
    token: str
    touches: tuple[Touch, ...]


@dataclass(frozen=True)
class Told:
    """One token of a text that is being generated, and the text that is certain by now: put together, these are the
    whole text."""

    arm: Literal["steered", "baseline"]
    index: int  # of the text among its arm's results
    token_id: int
    text: str
    logprob: Spoken | None
    trace: Traced | None


@dataclass(frozen=True)
class Result:
    """One generated text."""

    text: str
    token_ids: tuple[int, ...]
    reason: FinishReason
    prompt_tokens: int
    steering: SteeringReport
    timing: Timing
    logprobs: tuple[Spoken, ...] | None
    trace: tuple[Traced, ...] | None


@dataclass(frozen=True)
class Comparison:
    """A steered text against its unsteered twin; see engine.types.Divergence."""

    first_divergence: int | None  # index of the first token that differs; None: they are the same
    kl_per_token: float
    logprob_under_baseline: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Answer:
    """`baseline` and `comparisons` follow the order of `results`."""

    id: str
    created: int  # Unix time, seconds
    model: str
    results: tuple[Result, ...]
    baseline: tuple[Result, ...] | None = None
    comparisons: tuple[Comparison, ...] | None = None
