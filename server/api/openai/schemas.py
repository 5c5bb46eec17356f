"""Request and response bodies of the OpenAI routes.

A field that is not listed is accepted where its value asks for nothing (`server/fields.py`), and an error that names it
otherwise.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.sequence import FinishReason, PositionsName
from server.errors import InvalidField
from server.fields import STREAM_FIELDS
from server.schemas import (
    MANY,
    MAX_TOKENS,
    Attributes,
    ChatFields,
    Items,
    LenientRequest,
    Message,
    NewTokens,
    Prompt,
    SamplingFields,
    SteeringBody,
    StrictRequest,
    TextFields,
    TokenTraceBody,
    new_tokens,
)
from server.types import STEERED, Arm, CheckpointRef, GenerateParams

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Items(MAX_TOKENS, least=1)]


class SteeringOptions(StrictRequest):
    """Our own part of a request, which OpenAI's clients send through `extra_body`."""

    checkpoint: str | None = Field(
        None,
        description="`name` or `name@version`, where `model` is the base model; absent: the model's, else the active",
    )
    attributes: Annotated[Attributes, MANY] | None = Field(
        None,
        description="multiplier per attribute; absent: the checkpoint's defaults; `{}`: unsteered; unlisted: 0; "
        "negative: the vector is subtracted, as far as its gate is open (docs/methods.md)",
    )
    positions: PositionsName | None = Field(None, description="absent: as the checkpoint says")
    trace: bool = Field(False, description="per token and attribute: gate, multiplier x gate, norm, cosine")


class StreamOptions(LenientRequest):
    """What a stream says besides the text; without a stream it has no effect."""

    known_fields = STREAM_FIELDS

    include_usage: bool = Field(False, description="a last chunk with the numbers of tokens")


class ChatMessage(Message):
    """One turn of a conversation."""


class OpenAIRequest(SamplingFields):
    """What the routes have in common."""

    model: str = Field(min_length=1, description="the base model: unsteered; a checkpoint: its default multipliers")
    stream_options: StreamOptions | None = None
    steering: SteeringOptions | None = None

    @property
    def usage_is_streamed(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _checkpoint_refs(self, base: str) -> tuple[CheckpointRef, ...]:
        """What `model` and `steering` ask for; `base`: the name of the base model, which is unsteered."""
        options = self.steering or SteeringOptions.model_construct()
        if self.model != base:
            if options.checkpoint not in (None, self.model):
                raise InvalidField(
                    f"'model' asks for checkpoint {self.model!r} already; ask for {base!r} to choose another.",
                    param="steering.checkpoint",
                )
            return (CheckpointRef(self.model, options.attributes, param="steering.", named_by="model"),)
        if options.checkpoint is None and options.attributes is None:
            return ()
        return (CheckpointRef(options.checkpoint, options.attributes, param="steering."),)

    def _params(self, base: str, max_new_tokens: int, logprobs: int | None, **prompt: Any) -> GenerateParams:
        options = self.steering or SteeringOptions.model_construct()
        return GenerateParams(
            **prompt,
            arms=(Arm(STEERED.name, self._checkpoint_refs(base)),),
            positions=options.positions,
            sampling=self.to_sampling(max_new_tokens, logprobs),
            seed=self.seed,
            n=self.n,
            trace=options.trace,
        )


class CompletionRequest(OpenAIRequest, TextFields):
    """Continue texts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo@v1", "prompt": "Q: What colour is the sky? A:", "max_tokens": 24, "seed": 1}]
        }
    )

    prompt: Prompt | Tokens | Annotated[list[Prompt | Tokens], Items(256, least=1)] = Field(
        description="a text or its token ids, or a list of such: a batch"
    )
    max_tokens: NewTokens = Field(
        16, description="0 goes with `echo`: nothing but the prompt; -1: as the model has room for"
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of each token and k alternatives")
    echo: bool = Field(
        False, description="the prompt stands before the answer; its log-probabilities are as if it had been generated"
    )

    def to_params(self, base: str) -> GenerateParams:
        """For the service; `base`: the name of the base model. Raises InvalidField."""
        if not (self.max_tokens or self.echo):
            raise InvalidField("'max_tokens': 0 asks for nothing, unless with 'echo'.", param="max_tokens")
        most = new_tokens(self.max_tokens, "max_tokens") if self.max_tokens else 0
        batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        given: list[Any] = self.prompt if batch else [self.prompt]  # type: ignore[assignment]
        prompts = tuple(one if isinstance(one, str) else tuple(one) for one in given)
        text = {"prompts": prompts, "single": not batch, "add_special_tokens": self.add_special_tokens}
        return self._params(base, most, self.logprobs, **text, echo=self.echo)


class ChatCompletionRequest(OpenAIRequest, ChatFields):
    """Answer in a conversation, through the model's chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "demo",
                    "messages": [{"role": "user", "content": "What colour is the sky?"}],
                    "max_tokens": 24,
                    "seed": 1,
                }
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Items(1024, least=1)]
    max_tokens: NewTokens | None = Field(None, description="absent or -1: as the model has room for")
    max_completion_tokens: NewTokens | None = Field(None, description="the newer name of `max_tokens`")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="so many alternatives to each token")

    def to_params(self, base: str) -> GenerateParams:
        """For the service; `base`: the name of the base model. Raises InvalidField."""
        given = {asked for asked in (self.max_tokens, self.max_completion_tokens) if asked is not None}
        if len(given) > 1:
            raise InvalidField(
                f"'max_tokens' is {self.max_tokens} and 'max_completion_tokens', its newer name, "
                f"{self.max_completion_tokens}; send one of them.",
                param="max_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        name = "max_completion_tokens" if self.max_tokens is None else "max_tokens"
        most = new_tokens(given.pop() if given else -1, name)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._params(
            base,
            most,
            logprobs,
            messages=tuple(message.to_template() for message in self.messages),
            chat=self.chat_options(),
            add_special_tokens=self.add_special_tokens,
        )


# --- responses ---


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """One text, or a piece of it. `steering` says what has steered it, with the last piece."""

    index: int
    finish_reason: FinishReason | None = None
    steering: SteeringBody | None = None
    trace: list[TokenTraceBody] | None = None


class CompletionLogprobs(BaseModel):
    """Lists that go along with each other, an entry for a token."""

    tokens: list[str] = Field(description="a part of a character is spelled by its bytes, as in `bytes:\\xe6\\x9d`")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(
        description="how many characters stand before the token; those of a stop string are listed, too"
    )


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None = None


class _Body(BaseModel):
    id: str
    created: int = Field(description="Unix time in seconds")
    model: str = Field(description="as the request named it")
    usage: Usage | None = None


class Completion(_Body):
    """An answer, or a chunk of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


@dataclass(slots=True)
class TopLogprob:
    """A token and its log-probability, nats; -9999: impossible."""

    token: str
    logprob: float
    bytes: Annotated[list[int] | None, Field(description="of a part of a character its own; null: they are not known")]


@dataclass(slots=True)
class ChatTokenLogprob(TopLogprob):
    """Beside the likeliest tokens in its place, best first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(_Body):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Choice):
    delta: Delta
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(_Body):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when it was loaded, Unix time in seconds")
    owned_by: Literal["mat-steer"] = "mat-steer"
    root: str = Field(description="the base model")
    adapter: str | None = Field(description="the LoRA adapter that was merged into the base model's weights")
    attributes: dict[str, float] = Field(description="default multipliers; none for the base model")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]
