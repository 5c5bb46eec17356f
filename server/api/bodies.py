"""The bodies of responses."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from server.engine.sequence import FinishReason, PositionsName
from server.exchange import Answer, Comparison, Result, ScoreAnswer, Spelled, Spoken, SteeringReport, Told, Traced
from server.registry import Loaded

Attributes = dict[str, float]


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class PartBody(BaseModel):
    checkpoint: str
    version: str
    sha256: str
    attributes: Attributes


class SteeringBody(BaseModel):
    """What steered a text. With several checkpoints the first three are null and `parts` lists them."""

    checkpoint: str | None
    version: str | None
    sha256: str | None
    attributes: Attributes
    positions: PositionsName
    steered_tokens: int | None = Field(description="counted on the device, where it happens; null for a score")
    parts: list[PartBody] | None = None

    @classmethod
    def of(cls, report: SteeringReport) -> "SteeringBody":
        parts = [PartBody(**vars(part)) for part in report.parts]
        single = parts[0] if len(parts) == 1 else None
        return cls(
            checkpoint=single.checkpoint if single else None,
            version=single.version if single else None,
            sha256=single.sha256 if single else None,
            attributes=single.attributes if single else {},
            positions=report.positions,
            steered_tokens=report.steered_tokens,
            parts=parts if len(parts) > 1 else None,
        )


class TimingBody(BaseModel):
    """Milliseconds since the request was queued."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


class LogprobBody(BaseModel):
    token_id: int
    token: str
    logprob: float

    @classmethod
    def of(cls, spelled: Spelled) -> "LogprobBody":
        return cls(token_id=spelled.token_id, token=spelled.spelling.text, logprob=spelled.logprob)


class TokenLogprobBody(LogprobBody):
    """Under the model as it was steered, before temperature and other sampling rules."""

    top: list[LogprobBody]

    @classmethod
    def told(cls, spoken: Spoken) -> "TokenLogprobBody":
        return cls(**vars(LogprobBody.of(spoken.chosen)), top=[LogprobBody.of(one) for one in spoken.top])


class TouchBody(BaseModel):
    """What one column of an attribute did to an activation."""

    attribute: str
    site: str = Field(description="layer.site")
    gate: float = Field(description="how open the gate was")
    strength: float = Field(description="multiplier x gate")
    delta_norm: float = Field(description="norm of what was added, before the activation's norm is restored")
    cosine: float = Field(description="between what was added and the activation")


class TraceBody(BaseModel):
    """A generated token, and what steering did to the activation from which it came."""

    token_id: int
    token: str
    columns: list[TouchBody]

    @classmethod
    def of(cls, traced: Traced) -> "TraceBody":
        return cls(
            token_id=traced.token_id,
            token=traced.token,
            columns=[TouchBody(**vars(touch)) for touch in traced.touches],
        )


class ResultBody(BaseModel):
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: UsageBody
    steering: SteeringBody
    timing: TimingBody
    logprobs: list[TokenLogprobBody] | None
    trace: list[TraceBody] | None = Field(description="by token; null where it was not asked for")

    @classmethod
    def of(cls, result: Result) -> "ResultBody":
        return cls(
            text=result.text,
            token_ids=list(result.token_ids),
            finish_reason=result.reason,
            usage=UsageBody(prompt_tokens=result.prompt_tokens, completion_tokens=len(result.token_ids)),
            steering=SteeringBody.of(result.steering),
            timing=TimingBody(**vars(result.timing)),
            logprobs=None if result.logprobs is None else [TokenLogprobBody.told(one) for one in result.logprobs],
            trace=None if result.trace is None else [TraceBody.of(one) for one in result.trace],
        )


class ComparisonBody(BaseModel):
    """How far steering moved the model, in natural logarithms, from passes over the finished texts."""

    first_divergence: int | None = Field(description="index of the first token that differs; null: the same text")
    kl_per_token: float = Field(description="mean over the steered text of KL(steered || unsteered), nats")
    logprob_under_baseline: float = Field(description="mean log-probability a token of the steered text, unsteered")
    perplexity_ratio: float = Field(description="perplexity of steered / baseline text, both under the unsteered model")

    @classmethod
    def of(cls, comparison: Comparison) -> "ComparisonBody":
        return cls(**vars(comparison))


class GenerateResponse(BaseModel):
    id: str
    model: str
    created: int = Field(description="Unix time in seconds")
    results: list[ResultBody] = Field(description="prompts in order, each with its `n` texts")
    baseline: list[ResultBody] | None = Field(description="the unsteered twins of `results`, in the same order")
    comparison: ComparisonBody | list[ComparisonBody] | None = Field(
        description="an object for one result, a list in the order of `results` for several; null without `baseline`"
    )

    @classmethod
    def of(cls, answer: Answer) -> "GenerateResponse":
        steered, *baseline = answer.arms
        return cls(
            id=answer.id,
            model=answer.model,
            created=answer.created,
            results=[ResultBody.of(result) for result in steered.results],
            baseline=[ResultBody.of(result) for arm in baseline for result in arm.results] or None,
            comparison=_one_or_all(steered.comparisons),
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

    @classmethod
    def of(cls, answer: Answer) -> "CompareResponse":
        return cls(
            id=answer.id,
            model=answer.model,
            created=answer.created,
            arms=[
                ArmBody(
                    name=arm.name,
                    results=[ResultBody.of(result) for result in arm.results],
                    comparison=_one_or_all(arm.comparisons),
                )
                for arm in answer.arms
            ],
        )


class ScoreBody(BaseModel):
    logprob: float = Field(description="of the whole continuation, nats; -9999: impossible")
    tokens: list[LogprobBody]


class ScoreResponse(BaseModel):
    id: str
    model: str
    created: int = Field(description="Unix time in seconds")
    scores: list[ScoreBody]
    steering: SteeringBody

    @classmethod
    def of(cls, answer: ScoreAnswer) -> "ScoreResponse":
        return cls(
            id=answer.id,
            model=answer.model,
            created=answer.created,
            scores=[
                ScoreBody(logprob=score.total, tokens=[LogprobBody.of(one) for one in score.tokens])
                for score in answer.scores
            ],
            steering=SteeringBody.of(answer.steering),
        )


class TokenBody(BaseModel):
    """The data of a `token` event of a stream."""

    arm: str = Field(description="steered, baseline, or an arm's own name")
    index: int = Field(description="of the text among the arm's results")
    token_id: int
    text: str = Field(description="what is certain by now; an arm's texts put together are its whole text")
    logprob: TokenLogprobBody | None
    trace: TraceBody | None

    @classmethod
    def of(cls, told: Told) -> "TokenBody":
        return cls(
            arm=told.arm,
            index=told.index,
            token_id=told.token_id,
            text=told.text,
            logprob=None if told.logprob is None else TokenLogprobBody.told(told.logprob),
            trace=None if told.trace is None else TraceBody.of(told.trace),
        )


def _one_or_all(comparisons: Sequence[Comparison] | None) -> ComparisonBody | list[ComparisonBody] | None:
    if comparisons is None:
        return None
    bodies = [ComparisonBody.of(comparison) for comparison in comparisons]
    return bodies[0] if len(bodies) == 1 else bodies


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


class CheckpointVersionsBody(BaseModel):
    name: str
    versions: list[CheckpointDetailBody]


class LoadedBody(BaseModel):
    """The checkpoint that is served from now on."""

    name: str
    version: str
    sha256: str

    @classmethod
    def of(cls, loaded: Loaded) -> "LoadedBody":
        return cls(name=loaded.name, version=loaded.version, sha256=loaded.sha256)


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
    checkpoint: str | None
