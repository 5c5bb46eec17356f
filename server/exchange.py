"""What goes into the service and what comes out: plain dataclasses, for HTTP and the terminal alike."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from server.engine.types import FinishReason, PositionsName, Sampling, Timing, Touch
from server.tokenizer import TokenText


@dataclass(frozen=True)
class Use:
    """A checkpoint (None: the active one) and multipliers for its attributes (None: its defaults)."""

    checkpoint: str | None = None
    attributes: Mapping[str, float] | None = None
    param: str = ""  # where in the request it stands, as in "steering.0."; for errors
    named_by: str = ""  # the field that names the checkpoint; empty: `param` and "checkpoint"


@dataclass(frozen=True)
class Arm:
    """One way to answer a request's prompts. Without uses: unsteered."""

    name: str
    uses: tuple[Use, ...]


STEERED, BASELINE = Arm("steered", (Use(),)), Arm("baseline", ())


@dataclass(frozen=True)
class Ask:
    """One request to generate. Exactly one of `prompts` and `messages` is given."""

    prompts: tuple[str | tuple[int, ...], ...] = ()  # texts, or their token ids
    messages: tuple[Mapping[str, str], ...] = ()
    single: bool = True  # the prompt came alone, not in a list; for errors
    arms: tuple[Arm, ...] = (STEERED,)  # all from the same prompts, seeds and rules
    reference: int = 0  # the arm that the others are compared with
    positions: PositionsName | None = None  # None: as the checkpoint says
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None  # None: one is drawn
    n: int = 1
    trace: bool = False
    echo: bool = False  # the prompts come back as the first arm reads them
    offsets: bool = False  # log-probabilities say where in the text their tokens begin


@dataclass(frozen=True)
class ScoreAsk:
    """One request for the log-likelihoods of given continuations of a prompt."""

    prompt: str
    continuations: tuple[str, ...]
    uses: tuple[Use, ...] = (Use(),)
    positions: PositionsName | None = None


@dataclass(frozen=True)
class Part:
    """A checkpoint that took part in the steering of a row."""

    checkpoint: str
    version: str
    sha256: str
    attributes: Mapping[str, float]


@dataclass(frozen=True)
class SteeringReport:
    """What steered a row. `steered_tokens` was counted on the device, inside the hook; None: it was not asked for."""

    parts: tuple[Part, ...]
    positions: PositionsName
    steered_tokens: int | None


@dataclass(frozen=True)
class Spelled:
    """A token and its log-probability."""

    token_id: int
    spelling: TokenText
    logprob: float


@dataclass(frozen=True)
class Spoken:
    """A generated token's log-probability beside the likeliest alternatives, best first."""

    chosen: Spelled
    top: tuple[Spelled, ...]
    offset: int | None = None  # characters of the text before it, where they were asked for


@dataclass(frozen=True)
class Echo:
    """A prompt as the model has read it. `spoken` follows its tokens from the second one on, as if they had been
    generated under the request's steering; None where log-probabilities were not asked for."""

    text: str
    first: TokenText  # its first token, before which there is nothing
    spoken: tuple[Spoken, ...] | None


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

    arm: str
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
    """A text against that of the reference arm; see engine.types.Divergence."""

    first_divergence: int | None  # index of the first token that differs; None: they are the same
    kl_per_token: float
    logprob_under_baseline: float
    perplexity_ratio: float


@dataclass(frozen=True)
class ArmAnswer:
    """What one arm gave: of each prompt its `n` texts. `comparisons` follow their order; the reference has none."""

    name: str
    results: tuple[Result, ...]
    comparisons: tuple[Comparison, ...] | None


@dataclass(frozen=True)
class Answer:
    """The arms in the order in which they were asked for."""

    id: str
    created: int  # Unix time, seconds
    model: str
    arms: tuple[ArmAnswer, ...]
    echoes: tuple[Echo, ...] = ()  # of the prompts, where they were asked for


# What a request that streams is told: at each time all that has come since the time before.
Stream = AsyncIterator[Sequence[Echo | Told | Answer]]


@dataclass(frozen=True)
class Score:
    """Log-likelihoods of one continuation, nats."""

    total: float
    tokens: tuple[Spelled, ...]


@dataclass(frozen=True)
class ScoreAnswer:
    """In the order of the continuations."""

    id: str
    created: int
    model: str
    scores: tuple[Score, ...]
    steering: SteeringReport
