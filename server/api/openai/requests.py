"""The bodies of requests to the OpenAI routes.

What has no effect here is taken only where it asks for nothing; anything else that is not listed is refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from server.api.schemas import LONGEST, Attributes, Prompt, Rules, StrictRequest
from server.engine.sequence import PositionsName
from server.errors import InvalidField
from server.exchange import STEERED, Arm, Ask, Use

# Fields of OpenAI's that clients send although they mean nothing by it: with these values they change nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class SteeringOptions(StrictRequest):
    """Our own part of a request, which OpenAI's clients send through `extra_body`."""

    checkpoint: str | None = Field(
        None,
        description="`name` or `name@version`, where `model` is the base model; absent: the model's, else the active",
    )
    attributes: Attributes | None = Field(
        None, description="multiplier per attribute; absent: the checkpoint's defaults; `{}`: unsteered; unlisted: 0"
    )
    positions: PositionsName | None = Field(None, description="absent: as the checkpoint says")
    trace: bool = Field(False, description="per token and attribute: gate, multiplier x gate, norm, cosine")


class StreamOptions(StrictRequest):
    """What a stream says besides the text."""

    include_usage: bool = Field(False, description="a last chunk with the numbers of tokens")


class TextPart(StrictRequest):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictRequest):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = Field("", description="may be absent in the assistant's turns only")

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, given: Any) -> Any:
        return _without_neutral(given)

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    def plain(self) -> dict[str, str]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _OpenAIRequest(Rules):
    model: str = Field(min_length=1, description="the base model: unsteered; a checkpoint: its default multipliers")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="not used")
    steering: SteeringOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, given: Any) -> Any:
        return _without_neutral(given)

    @property
    def usage_is_streamed(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _uses(self, base: str) -> tuple[Use, ...]:
        """What the model's name and the options ask for; `base`: the name of the unsteered model."""
        options = self.steering or SteeringOptions.model_construct()
        if self.model != base:
            if options.checkpoint not in (None, self.model):
                raise InvalidField(
                    f"'model' asks for checkpoint {self.model!r} already; ask for {base!r} to choose another.",
                    param="steering.checkpoint",
                )
            return (Use(self.model, options.attributes, param="steering.", named_by="model"),)
        if options.checkpoint is None and options.attributes is None:
            return ()
        return (Use(options.checkpoint, options.attributes, param="steering."),)

    def _ask(self, base: str, max_new_tokens: int, logprobs: int | None, **prompt: Any) -> Ask:
        if self.stream_options is not None and not self.stream:
            raise InvalidField("'stream_options' are for streams only.", param="stream_options")
        options = self.steering or SteeringOptions.model_construct()
        return Ask(
            **prompt,
            arms=(Arm(STEERED.name, self._uses(base)),),
            positions=options.positions,
            sampling=self.sampling(max_new_tokens, logprobs),
            seed=self.seed,
            n=self.n,
            trace=options.trace,
        )


class CompletionRequest(_OpenAIRequest):
    """Continue texts."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo@v1", "prompt": "Q: Is grass green? A:", "max_tokens": 24}]}
    )

    prompt: Prompt | Tokens | Annotated[list[Prompt | Tokens], Field(min_length=1, max_length=256)] = Field(
        description="a text or its token ids, or a list of such: a batch"
    )
    max_tokens: int = Field(16, ge=0, le=LONGEST, description="0 goes with `echo`: nothing but the prompt")
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of each token and k alternatives")
    echo: bool = Field(
        False, description="the prompt stands before the answer; its log-probabilities are as if it had been generated"
    )

    def ask(self, base: str) -> Ask:
        """What the service is asked. Raises InvalidField."""
        if not (self.max_tokens or self.echo):
            raise InvalidField("'max_tokens': 0 asks for nothing, unless with 'echo'.", param="max_tokens")
        batch = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        given: list[Any] = self.prompt if batch else [self.prompt]  # type: ignore[assignment]
        prompts = tuple(one if isinstance(one, str) else tuple(one) for one in given)
        return self._ask(
            base, self.max_tokens, self.logprobs, prompts=prompts, single=not batch, echo=self.echo, offsets=True
        )


class ChatRequest(_OpenAIRequest):
    """Answer in a conversation, through the model's chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "demo",
                    "messages": [{"role": "user", "content": "Is grass green?"}],
                    "max_tokens": 24,
                }
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_tokens: int | None = Field(None, ge=1, le=LONGEST, description="absent: as the model has room for")
    max_completion_tokens: int | None = Field(None, ge=1, le=LONGEST, description="the newer name of `max_tokens`")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="so many alternatives to each token")

    def ask(self, base: str) -> Ask:
        """What the service is asked. Raises InvalidField."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidField("Send either 'max_tokens' or 'max_completion_tokens', not both.", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidField("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        most = self.max_tokens or self.max_completion_tokens or LONGEST
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._ask(base, most, logprobs, messages=tuple(message.plain() for message in self.messages))


def _without_neutral(given: Any) -> Any:
    """A null is what is not there at all, for clients that send all that they know."""
    if not isinstance(given, dict):
        return given
    return {
        name: value
        for name, value in given.items()
        if value is not None and not any(value == neutral for neutral in NEUTRAL.get(name, ()))
    }
