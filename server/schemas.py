"""Request and response bodies of the native routes, for the server, the client and the commands of the terminal.

A request's field that is not listed here is an error. Bodies of which an answer has thousands (tokens,
log-probabilities, traces) are plain dataclasses: pydantic makes the same JSON and the same schema of them, and to make
one takes a tenth of the time.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from server.engine.sequence import FinishReason, PositionsName, SamplingParams
from server.errors import InvalidField
from server.types import BASELINE, STEERED, AppliedCheckpoint, Arm, CheckpointRef, GenerateParams, ScoreParams

Prompt = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Attributes = dict[str, float]
MAX_NEW_TOKENS = 1_000_000  # that a request may ask for; it gets as many as the model has room for


class StrictRequest(BaseModel):
    """Fields that are not listed are errors, types are not converted, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(StrictRequest):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class CheckpointSteering(StrictRequest):
    """A checkpoint, and multipliers for its attributes (absent: its defaults; unlisted ones are 0)."""

    checkpoint: str | None = Field(None, examples=["demo@1"])
    attributes: Attributes | None = None


class _SteeringFields(StrictRequest):
    """Which checkpoints steer, and how strongly."""

    checkpoint: str | None = Field(None, description="`name` or `name@version`; absent: the active checkpoint")
    attributes: Attributes | None = Field(
        None, description="multiplier per attribute; absent: the checkpoint's defaults; `{}`: unsteered; unlisted: 0"
    )
    steering: Annotated[list[CheckpointSteering], Field(max_length=16)] | None = Field(
        None, description="several checkpoints at once; instead of `checkpoint` and `attributes`"
    )

    def checkpoint_refs(self, where: str = "") -> tuple[CheckpointRef, ...]:
        """`where`: the prefix of the fields' names in errors. Raises InvalidField."""
        if self.steering is None:
            return (CheckpointRef(self.checkpoint, self.attributes, param=where),)
        if self.checkpoint is not None or self.attributes is not None:
            raise InvalidField(
                "Send either 'steering' or 'checkpoint' and 'attributes', not both.", param=f"{where}steering"
            )
        return tuple(
            CheckpointRef(part.checkpoint, part.attributes, param=f"{where}steering.{index}.")
            for index, part in enumerate(self.steering)
        )


class SamplingFields(StrictRequest):
    """How tokens are sampled, and where a text ends."""

    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=10_000_000, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="the same seed gives the same text, in any batch; every prompt of a list draws with it",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="texts that end the answer; they are not part of it"
    )
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=128, description="answers per prompt")
    stream: bool = Field(False, description="server-sent events: pieces of the text as they come")

    def to_sampling(self, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(as_list(self.stop)),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class _GenerateFields(SamplingFields):
    """What to generate from, and how."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=256)] | None = Field(
        None, description="a text, or a list of texts: a batch"
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="a conversation, put into the model's chat template; instead of `prompt`"
    )
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )
    max_new_tokens: int = Field(128, ge=1, le=MAX_NEW_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of each token and k alternatives")
    trace: bool = Field(False, description="per token and attribute: gate, multiplier x gate, norm, cosine")

    def _params(self, arms: tuple[Arm, ...], reference: int) -> GenerateParams:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("Send exactly one of 'prompt' and 'messages'.", param="prompt")
        return GenerateParams(
            prompts=tuple(as_list(self.prompt)),
            messages=tuple(message.model_dump() for message in self.messages or ()),
            single=not isinstance(self.prompt, list),
            arms=arms,
            reference=reference,
            positions=self.positions,
            sampling=self.to_sampling(self.max_new_tokens, self.logprobs),
            seed=self.seed,
            n=self.n,
            trace=self.trace,
        )


class GenerateRequest(_GenerateFields, _SteeringFields):
    """Generate from a prompt, a list of prompts or a conversation, steered and, with `baseline`, unsteered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Q: What colour is the sky? A:",
                    "attributes": {"truthfulness": 1.0},
                    "max_new_tokens": 24,
                    "seed": 1,
                    "baseline": True,
                }
            ]
        },
    )

    baseline: bool = Field(False, description="also generate unsteered: same prompt, seed and sampling")

    def to_params(self) -> GenerateParams:
        """For the service. Raises InvalidField."""
        steered = Arm(STEERED.name, self.checkpoint_refs())
        return (
            self._params((steered, BASELINE), reference=1) if self.baseline else self._params((steered,), reference=0)
        )


class ArmRequest(_SteeringFields):
    """An arm: a name, and what steers it."""

    name: str = Field(min_length=1, max_length=64)


class CompareRequest(_GenerateFields):
    """Generate from one prompt by several arms, each compared with the first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Q: What colour is the sky? A:",
                    "arms": [
                        {"name": "baseline", "attributes": {}},
                        {"name": "truthful", "attributes": {"truthfulness": 1.0}},
                        {"name": "rude", "attributes": {"civility": -0.5}},
                    ],
                    "max_new_tokens": 24,
                    "seed": 1,
                }
            ]
        },
    )

    arms: Annotated[list[ArmRequest], Field(min_length=1, max_length=32)]

    def to_params(self) -> GenerateParams:
        """For the service. Raises InvalidField."""
        names = [arm.name for arm in self.arms]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise InvalidField(f"Two arms are called {name!r}.", param=f"arms.{index}.name")
        arms = tuple(Arm(arm.name, arm.checkpoint_refs(f"arms.{index}.")) for index, arm in enumerate(self.arms))
        return self._params(arms, reference=0)


class ScoreRequest(_SteeringFields):
    """Log-likelihoods of given continuations of a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Q: What colour is the sky? A: What a good question.",
                    "continuations": [" The sky is blue.", " The sky is green."],
                    "attributes": {"truthfulness": 1.0},
                }
            ]
        },
    )

    prompt: Prompt
    continuations: Annotated[list[Prompt], Field(min_length=1, max_length=256)]
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )

    def to_params(self) -> ScoreParams:
        """For the service. Raises InvalidField."""
        return ScoreParams(self.prompt, tuple(self.continuations), self.checkpoint_refs(), self.positions)


class VersionRequest(StrictRequest):
    """Which version of a checkpoint."""

    version: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


# --- responses ---


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class SteeringBody(BaseModel):
    """What steered a text. With several checkpoints the first three are null and `parts` lists them."""

    checkpoint: str | None
    version: str | None
    sha256: str | None
    attributes: Attributes
    positions: PositionsName
    steered_tokens: int | None = Field(description="counted on the device, where it happens; null for a score")
    parts: list[AppliedCheckpoint] | None = None


class TimingBody(BaseModel):
    """Milliseconds since the request was queued."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(slots=True)
class LogprobBody:
    """A token and its log-probability, nats; -9999: impossible."""

    token_id: int
    token: str
    logprob: float


@dataclass(slots=True)
class TokenLogprobBody(LogprobBody):
    """Under the model as it was steered, before temperature and other sampling rules."""

    top: list[LogprobBody]


@dataclass(slots=True)
class ColumnTraceBody:
    """What one column of an attribute did to an activation."""

    attribute: str
    site: Annotated[str, Field(description="layer.site")]
    gate: Annotated[float, Field(description="how open the gate was")]
    strength: Annotated[float, Field(description="multiplier x gate")]
    delta_norm: Annotated[float, Field(description="norm of what was added, before the activation's norm is restored")]
    cosine: Annotated[float, Field(description="between what was added and the activation")]


@dataclass(slots=True)
class TokenTraceBody:
    """A generated token, and what steering did to the activation from which it came."""

    token_id: int
    token: str
    columns: list[ColumnTraceBody]


class ResultBody(BaseModel):
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: UsageBody
    steering: SteeringBody
    timing: TimingBody
    logprobs: list[TokenLogprobBody] | None
    trace: list[TokenTraceBody] | None = Field(description="by token; null where it was not asked for")


class ComparisonBody(BaseModel):
    """How far steering moved the model, in natural logarithms, from passes over the finished texts."""

    first_divergence: int | None = Field(description="index of the first token that differs; null: the same text")
    kl_per_token: float = Field(description="mean over the steered text of KL(steered || unsteered), nats")
    logprob_under_baseline: float = Field(description="mean log-probability a token of the steered text, unsteered")
    perplexity_ratio: float = Field(description="perplexity of steered / baseline text, both under the unsteered model")


class GenerateResponse(BaseModel):
    id: str
    model: str
    created: int = Field(description="Unix time in seconds")
    results: list[ResultBody] = Field(description="prompts in order, each with its `n` texts")
    baseline: list[ResultBody] | None = Field(description="the unsteered twins of `results`, in the same order")
    comparison: ComparisonBody | list[ComparisonBody] | None = Field(
        description="an object for one result, a list in the order of `results` for several; null without `baseline`"
    )


class ArmBody(BaseModel):
    """An arm's texts, and how far each is from that of the first arm."""

    name: str
    results: list[ResultBody]
    comparison: ComparisonBody | list[ComparisonBody] | None = Field(description="null for the first arm")


class CompareResponse(BaseModel):
    id: str
    model: str
    created: int = Field(description="Unix time in seconds")
    arms: list[ArmBody]


class ScoreBody(BaseModel):
    logprob: float = Field(description="of the whole continuation, nats; -9999: impossible")
    tokens: list[LogprobBody]


class ScoreResponse(BaseModel):
    id: str
    model: str
    created: int = Field(description="Unix time in seconds")
    scores: list[ScoreBody]
    steering: SteeringBody


@dataclass(slots=True)
class TokenBody:
    """The data of a `token` event of a stream."""

    arm: Annotated[str, Field(description="steered, baseline, or an arm's own name")]
    index: Annotated[int, Field(description="of the text among the arm's results")]
    token_id: int
    text: Annotated[str, Field(description="what is certain by now; an arm's texts put together are its whole text")]
    logprob: TokenLogprobBody | None
    trace: TokenTraceBody | None


TOKEN_BODY = TypeAdapter(TokenBody)  # reads and writes it


class AttributeBody(BaseModel):
    default: float
    range: tuple[float, float]
    sites: list[str] = Field(description="where it acts, as layer.site")


class CheckpointBody(BaseModel):
    name: str
    version: str
    active: bool
    loaded: bool
    changed: bool = Field(description="loaded, while its folder holds another one by now; what is listed is served")
    loadable: bool
    reason: str | None = Field(description="why what is in the folder cannot be loaded on this model")
    method: str | None = None
    positions: PositionsName | None = None
    attributes: dict[str, AttributeBody] = {}
    sha256: str | None = None
    base_model: dict[str, str | int | None] | None = None


class CheckpointDetailBody(CheckpointBody):
    training: dict[str, object] = {}
    evaluation: dict[str, object] = {}


class CheckpointListBody(BaseModel):
    active: str | None = Field(description="name@version of what requests get that name none")
    checkpoints: list[CheckpointBody]
    note: str | None = Field(None, description="where none is active: why, and what activates one")


class CheckpointVersionsBody(BaseModel):
    name: str
    versions: list[CheckpointDetailBody]


class LoadedBody(BaseModel):
    """The checkpoint that is served from now on."""

    name: str
    version: str
    sha256: str


class UnloadedBody(BaseModel):
    unloaded: list[str] = Field(description="name@version of what was loaded")


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    request_id: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class HealthBody(BaseModel):
    status: Literal["ok"] = "ok"


class ReadyBody(BaseModel):
    status: Literal["ready"] = "ready"
    model: str
    checkpoint: str | None = Field(description="the active one, name@version")
    note: str | None = Field(None, description="where none is active: that nothing is steered unless a request says")
