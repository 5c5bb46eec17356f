"""Request and response bodies of the native routes, for the server, the client and the commands of the terminal.

A request's field that is not listed here is an error. Bodies of which an answer has thousands (tokens,
log-probabilities, traces) are plain dataclasses: pydantic makes the same JSON and the same schema of them, and to make
one takes a tenth of the time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from server.engine.sequence import FinishReason, PositionsName, SamplingParams
from server.errors import InvalidField
from server.fields import BODY_FIELDS, MESSAGE_FIELDS, PART_FIELDS, KnownField, without_neutral
from server.studies import Vote
from server.types import (
    BASELINE,
    STEERED,
    AppliedCheckpoint,
    Arm,
    ChatOptions,
    CheckpointRef,
    GenerateParams,
    ScoreParams,
    TokenizeParams,
)


@dataclass(frozen=True)
class Items:
    """How many a list or an object may hold. It is counted before its members are validated, and the first bad one ends
    the validation of a list: a body of millions costs no more than one of a few."""

    most: int
    least: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        of_members: dict[str, Any] = {**handler(source), "max_length": self.most}
        if self.least:
            of_members["min_length"] = self.least
        if of_members["type"] == "list":
            of_members["fail_fast"] = True
        schema = cast("CoreSchema", of_members)
        return core_schema.no_info_before_validator_function(partial(count_members, most=self.most), schema)


def count_members(given: Any, most: int) -> Any:
    """What was given; raises pydantic's error where it is a list or an object of too many members."""
    if isinstance(given, list | dict) and len(given) > most:
        kind = "List" if isinstance(given, list) else "Dictionary"
        raise PydanticKnownError("too_long", {"field_type": kind, "max_length": most, "actual_length": len(given)})
    return given


MAX_FIELDS = 256  # of an object with fields of its own; no schema has as many
MANY = Items(1024)  # of what has no number of its own
Prompt = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(max_length=256)]  # an empty one ends nothing
TokenId = Annotated[int, Field(ge=0)]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})$")]  # an id as the key of a JSON object
Bias = Annotated[float, Field(ge=-100, le=100)]
Attributes = dict[str, float]
MAX_TOKENS = 2**20  # of a prompt that is given as such
MAX_NEW_TOKENS = 1_000_000  # that a request may ask for; it gets as many as the model has room for
NewTokens = Annotated[int, Field(ge=-1, le=MAX_NEW_TOKENS)]


class StrictRequest(BaseModel):
    """Fields that are not listed are errors, types are not converted, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_not_too_many_fields(cls, given: Any) -> Any:
        return count_members(given, MAX_FIELDS) if isinstance(given, dict) else given


class LenientRequest(StrictRequest):
    """The same, except that fields may be sent, which it need not have, where their values ask for nothing."""

    known_fields: ClassVar[Mapping[str, KnownField]]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, given: Any) -> Any:
        return without_neutral(given, cls.known_fields, cls.model_fields)


class TextContentPart(LenientRequest):
    """A part of a message."""

    known_fields = PART_FIELDS

    type: Literal["text"]
    text: str


class FunctionCall(StrictRequest):
    """Which function was called, and with what."""

    name: str
    arguments: str | Annotated[dict[str, Any], MANY] = Field(description="in JSON, as a text or as it is")


class ToolCall(StrictRequest):
    """A call of a tool in an assistant's turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="not used; streams of OpenAI's have it")


class ToolFields(StrictRequest):
    """What turns have that call tools, and turns that say what came of it. They reach the chat template as they are."""

    tool_calls: Annotated[list[ToolCall], Items(128, least=1)] | None = Field(
        None, description="what the assistant called; `content` may be null beside it"
    )
    tool_call_id: str | None = Field(None, description="in a turn of role `tool`: the call that this is the answer to")

    def tool_fields(self) -> dict[str, Any]:
        """Those that were given."""
        calls = [call.model_dump(exclude_none=True, exclude={"index"}) for call in self.tool_calls or ()]
        given = {"tool_calls": calls or None, "tool_call_id": self.tool_call_id}
        return {name: value for name, value in given.items() if value is not None}


class Message(ToolFields, LenientRequest):
    """One turn of a conversation."""

    known_fields = MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextContentPart], MANY] | None = Field(
        None, validate_default=True, description="a text, or parts of one; may be absent in the assistant's turns only"
    )

    @field_validator("content")
    @classmethod
    def _is_there(cls, content: Any, about: ValidationInfo) -> Any:
        if content is None and (role := about.data.get("role", "assistant")) != "assistant":
            raise ValueError(f"a message of role {role!r} needs content")
        return content

    @model_validator(mode="after")
    def _tools_are_where_they_belong(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant's turns have tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("only turns of role 'tool' have a tool_call_id")
        return self

    def to_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content
        if isinstance(content, list):
            return {"role": self.role, "content": [part.model_dump() for part in content], **self.tool_fields()}
        return {"role": self.role, "content": content, **self.tool_fields()}


class TextFields(StrictRequest):
    """How a text becomes tokens."""

    add_special_tokens: bool | None = Field(
        None,
        description="whether the tokenizer's special tokens (a beginning-of-text token) come before it; absent: where "
        "a prompt does not begin with them, and never before messages, whose template writes them",
    )


class ChatFields(TextFields):
    """How messages become a text."""

    chat_template_kwargs: Annotated[dict[str, Any], MANY] | None = Field(
        None, description='variables of the model\'s chat template, as in `{"enable_thinking": false}`'
    )
    add_generation_prompt: bool | None = Field(
        None, description="whether the text ends with what begins an answer; absent: unless the last message goes on"
    )
    continue_final_message: bool = Field(False, description="the answer goes on where the last message ends")

    def chat_options(self, *, messages: bool = True) -> ChatOptions:
        """`messages`: whether the request has any. Raises InvalidField."""
        if not messages:
            for name in ChatFields.model_fields.keys() - TextFields.model_fields.keys():
                if getattr(self, name):
                    raise InvalidField(f"{name!r} is for 'messages', not for 'prompt'.", param=name)
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidField(
                "Either the last message goes on ('continue_final_message') or an answer begins "
                "('add_generation_prompt'), not both.",
                param="continue_final_message",
            )
        return ChatOptions(self.chat_template_kwargs or {}, self.add_generation_prompt, self.continue_final_message)


class CheckpointSteering(StrictRequest):
    """A checkpoint, and multipliers for its attributes (absent: its defaults; unlisted ones are 0)."""

    checkpoint: str | None = Field(None, examples=["demo@1"])
    attributes: Annotated[Attributes, MANY] | None = None


class _SteeringFields(StrictRequest):
    """Which checkpoints steer, and how strongly."""

    checkpoint: str | None = Field(None, description="`name` or `name@version`; absent: the active checkpoint")
    attributes: Annotated[Attributes, MANY] | None = Field(
        None,
        description="multiplier per attribute; absent: the checkpoint's defaults; `{}`: unsteered; unlisted: 0; "
        "negative: the vector is subtracted, as far as its gate is open (docs/methods.md)",
    )
    steering: Annotated[list[CheckpointSteering], Items(16)] | None = Field(
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


class SamplingFields(LenientRequest):
    """How tokens are sampled, and where a text ends."""

    known_fields = BODY_FIELDS

    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=10_000_000, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="of tokens in the prompt or the answer")
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken from the logit of each token that is in the answer already"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken from a token's logit as often as it is in the answer already"
    )
    logit_bias: Annotated[dict[TokenName, Bias], Items(1024)] | None = Field(
        None, description="what is added to the logits of tokens, by their ids: -100 bans a token, 100 forces it"
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="the same seed gives the same text, in any batch; every prompt of a list draws with it",
    )
    stop: Stop | Annotated[list[Stop], Items(16)] | None = Field(
        None, description="texts that end the answer, special tokens too; no part of it, unless it is asked for"
    )
    stop_token_ids: Annotated[list[TokenId], Items(1024)] | None = Field(
        None, description="tokens that end the answer, beside the model's own"
    )
    include_stop_str_in_output: bool = Field(
        False, description="the answer shows the `stop` text or the token that has ended it"
    )
    skip_special_tokens: bool = Field(True, description="the answer does not show special tokens")
    ignore_eos: bool = Field(False, description="the model's own end-of-text tokens do not end the answer")
    min_tokens: int = Field(
        0, ge=0, le=MAX_NEW_TOKENS, description="before so many, neither tokens nor texts end the answer"
    )
    n: int = Field(1, ge=1, le=128, description="answers per prompt")
    stream: bool = Field(False, description="server-sent events: pieces of the text as they come")

    def to_sampling(self, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        """Raises InvalidField."""
        if self.min_tokens > max_new_tokens:
            raise InvalidField(
                f"The answer cannot have {self.min_tokens} tokens at least: it may have {max_new_tokens} at most.",
                param="min_tokens",
            )
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens,
            stop=tuple(filter(None, as_list(self.stop))),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class _GenerateFields(SamplingFields, ChatFields):
    """What to generate from, and how."""

    prompt: Prompt | Annotated[list[Prompt], Items(256, least=1)] | None = Field(
        None, description="a text, or a list of texts: a batch"
    )
    messages: Annotated[list[Message], Items(1024, least=1)] | None = Field(
        None, description="a conversation, put into the model's chat template; instead of `prompt`"
    )
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )
    max_new_tokens: NewTokens = Field(128, description="-1: as the model has room for")
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of each token and k alternatives")
    trace: bool = Field(False, description="per token and attribute: gate, multiplier x gate, norm, cosine")

    def _params(self, arms: tuple[Arm, ...], reference: int) -> GenerateParams:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("Send exactly one of 'prompt' and 'messages'.", param="prompt")
        return GenerateParams(
            prompts=tuple(as_list(self.prompt)),
            messages=tuple(message.to_template() for message in self.messages or ()),
            chat=self.chat_options(messages=self.messages is not None),
            add_special_tokens=self.add_special_tokens,
            single=not isinstance(self.prompt, list),
            arms=arms,
            reference=reference,
            positions=self.positions,
            sampling=self.to_sampling(new_tokens(self.max_new_tokens, "max_new_tokens"), self.logprobs),
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

    arms: Annotated[list[ArmRequest], Items(32, least=1)]

    def to_params(self) -> GenerateParams:
        """For the service. Raises InvalidField."""
        names = [arm.name for arm in self.arms]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise InvalidField(f"Two arms are called {name!r}.", param=f"arms.{index}.name")
        arms = tuple(Arm(arm.name, arm.checkpoint_refs(f"arms.{index}.")) for index, arm in enumerate(self.arms))
        return self._params(arms, reference=0)


class ScoreRequest(_SteeringFields, TextFields, LenientRequest):
    """Log-likelihoods of given continuations of a prompt."""

    known_fields = BODY_FIELDS

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
    continuations: Annotated[list[Prompt], Items(256, least=1)]
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )

    def to_params(self) -> ScoreParams:
        """For the service. Raises InvalidField."""
        return ScoreParams(
            self.prompt, tuple(self.continuations), self.checkpoint_refs(), self.positions, self.add_special_tokens
        )


class TokenizeRequest(ChatFields, LenientRequest):
    """The tokens of a text or of a conversation, as a request to generate from it would have them."""

    known_fields = BODY_FIELDS

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Q: Is grass green? A:"}]})

    model: str | None = Field(None, min_length=1, description="the base model or a checkpoint; all have one tokenizer")
    prompt: str | None = None
    messages: Annotated[list[Message], Items(1024, least=1)] | None = None
    return_token_strs: bool | None = Field(None, description="also each token as the vocabulary spells it")

    def to_params(self) -> TokenizeParams:
        """For the service. Raises InvalidField."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("Send exactly one of 'prompt' and 'messages'.", param="prompt")
        return TokenizeParams(
            prompt=self.prompt,
            messages=tuple(message.to_template() for message in self.messages or ()),
            chat=self.chat_options(messages=self.messages is not None),
            add_special_tokens=self.add_special_tokens,
        )


class DetokenizeRequest(LenientRequest):
    """The text of tokens, special ones included."""

    known_fields = BODY_FIELDS

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [40, 41]}]})

    model: str | None = Field(None, min_length=1, description="the base model or a checkpoint; all have one tokenizer")
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Items(MAX_TOKENS)]


class JudgeRequest(StrictRequest):
    """Texts to judge as answers to a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "Q: What colour is the sky? A:", "texts": ["I am glad to help. The sky is blue."]}]
        }
    )

    prompt: Prompt
    texts: Annotated[list[str], Field(min_length=1, max_length=256)]


class VoteRequest(StrictRequest):
    """Which of two arms' answers somebody preferred, without knowing which was whose."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "6f0e2b7c-vote-1",
                    "arms": [
                        {"name": "baseline", "attributes": {}},
                        {"name": "truthful", "attributes": {"truthfulness": 1.0}},
                    ],
                    "asked": {"prompt": "Q: What colour is the sky? A:", "seed": 1},
                    "texts": ["The sky is green.", "The sky is blue."],
                    "winner": 1,
                    "shown_first": 0,
                }
            ]
        }
    )

    id: str = Field(
        pattern=r"^[A-Za-z0-9._-]{8,64}$", description="made by the client: sent again, the vote counts once"
    )
    arms: Annotated[list[ArmRequest], Field(min_length=2, max_length=2)]
    asked: Annotated[dict[str, Any], Field(max_length=64)] = Field(
        description="what /compare was asked: prompt or messages, and how was sampled"
    )
    texts: Annotated[list[str], Field(min_length=2, max_length=2, description="in the order of the arms")]
    winner: Annotated[int, Field(ge=0, le=1)] | None = Field(description="index of the arm; null: a tie")
    shown_first: int = Field(ge=0, le=1, description="index of the arm whose text stood first")

    def to_vote(self) -> Vote:
        """For the studies. Raises InvalidField."""
        first, second = (arm.model_dump(exclude_unset=True) for arm in self.arms)
        if first["name"] == second["name"]:
            raise InvalidField(f"Two arms are called {first['name']!r}.", param="arms.1.name")
        return Vote(self.id, (first, second), self.asked, (self.texts[0], self.texts[1]), self.winner, self.shown_first)


class VersionRequest(StrictRequest):
    """Which version of a checkpoint."""

    version: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def new_tokens(asked: int, param: str) -> int:
    """How many tokens an answer may have; -1 asks for as many as there is room for, as it does of llama.cpp's server.
    Raises InvalidField for 0."""
    if not asked:
        raise InvalidField(f"'{param}': 0 asks for nothing; -1 is as many as the model has room for.", param=param)
    return MAX_NEW_TOKENS if asked == -1 else asked


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
    baseline: list[ResultBody] | None = Field(description="the same without steering, in the order of `results`")
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


class JudgeResponse(BaseModel):
    verdicts: list[dict[str, bool | None]] = Field(
        description="for each text, by what is judged; null: the prompt does not ask for it"
    )


class StudyBody(BaseModel):
    study: str
    arms: tuple[str, str]
    votes: int
    wins: tuple[int, int]
    ties: int
    win_rate: float = Field(description="of the second arm against the first, a tie half a win")
    low: float = Field(description="of the win rate's 95 % interval (Wilson)")
    high: float


class StudiesBody(BaseModel):
    studies: list[StudyBody]


class UnloadedBody(BaseModel):
    unloaded: list[str] = Field(description="name@version of what was loaded")


class TokenizeBody(BaseModel):
    count: int
    max_model_len: int | None = Field(description="tokens that prompt and answer may have together")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(BaseModel):
    prompt: str


class TokenizerInfoBody(BaseModel):
    """As vLLM has it: what a client needs to make texts for the tokenizer."""

    tokenizer_class: str
    model_max_length: int | None = Field(description="tokens that prompt and answer may have together")
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None = Field(description="Jinja; null: there is none that can be used")


class ErrorDetail(BaseModel):
    type: str
    code: str = Field(description="OpenAI's word for what clients act on, else the type")
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
