"""Request and response bodies of /v1/responses, for text (https://platform.openai.com/docs/api-reference/responses)."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.api.openai.schemas import OpenAIRequest
from server.fields import PART_FIELDS
from server.schemas import (
    MANY,
    MAX_NEW_TOKENS,
    MAX_TOKENS,
    ChatFields,
    Items,
    LenientRequest,
    Prompt,
    SteeringBody,
    StrictRequest,
    TokenTraceBody,
)
from server.types import GenerateParams


class _Part(LenientRequest):
    """A null counts as absent: clients send answers back with every field that their own types have."""

    known_fields = PART_FIELDS


class TextItemPart(_Part):
    """A part of a message: `output_text` as an answer had it, with what stands beside it there."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], MANY] | None = Field(None, description="not used")
    logprobs: Annotated[list[Any], Items(MAX_TOKENS)] | None = Field(None, description="not used")


class InputItem(_Part):
    """A message, a call of a tool, or what came of one."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = Field(None, description="of a message")
    content: str | Annotated[list[TextItemPart], MANY] | None = Field(None, description="of a message")
    call_id: str | None = Field(None, description="of a call, and of what came of it")
    name: str | None = Field(None, description="of the function that is called")
    arguments: str | None = Field(None, description="of the call, in JSON")
    output: str | Annotated[list[TextItemPart], MANY] | None = Field(None, description="what came of the call")
    id: str | None = Field(None, description="not used")
    phase: str | None = Field(None, description="not used")
    status: str | None = Field(None, description="not used")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed[self.type]:
            if getattr(self, name) is None:
                raise ValueError(f"an item of type {self.type!r} needs {name!r}")
        return self


class ResponseStreamOptions(StrictRequest):
    """Of OpenAI's streams."""

    include_obfuscation: bool | None = Field(None, description="not used: nothing is added to events")


class ResponsesRequest(OpenAIRequest, ChatFields):
    """Answer a text or a conversation."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo", "input": "Is grass green?", "max_output_tokens": 24}]}
    )

    input: Prompt | Annotated[list[InputItem], Items(1024, least=1)] = Field(
        description="what the user says, or the items of a conversation"
    )
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="absent: as the model has room for"
    )
    n: int = Field(1, ge=1, le=1, description="this route gives one answer")
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]
    metadata: Annotated[dict[str, str], MANY] | None = Field(None, description="not used; the answer has it again")
    store: bool | None = Field(None, description="not used: nothing is stored")
    prompt_cache_key: str | None = Field(None, description="not used")
    prompt_cache_retention: str | None = Field(None, description="not used")
    safety_identifier: str | None = Field(None, description="not used")
    reasoning: Annotated[dict[str, Any], MANY] | None = Field(None, description="not used")

    def to_params(self, base: str) -> GenerateParams:
        """For the service; `base`: the name of the base model. Raises InvalidField."""
        return self._params(
            base,
            self.max_output_tokens or MAX_NEW_TOKENS,
            None,
            messages=tuple(turn for _, turn in self._turns()),
            chat=self.chat_options(),
            add_special_tokens=self.add_special_tokens,
        )

    def field_of(self, param: str | None) -> str | None:
        """What an error calls a field of the conversation, as in "messages.1.content", as this body calls it."""
        name, _, place = (param or "").partition(".")
        if name != "messages":
            return param
        index = place.partition(".")[0]
        return self._turns()[int(index)][0] if index else "input"

    def _turns(self) -> list[tuple[str, dict[str, Any]]]:
        """The input as a conversation, each turn with the field that it begins with. Calls of tools that follow each
        other, or a message of the assistant, are one turn with it, as chat templates have them."""
        turns: list[tuple[str, dict[str, Any]]] = []
        if self.instructions:
            turns.append(("instructions", {"role": "system", "content": self.instructions}))
        if isinstance(self.input, str):
            return [*turns, ("input", {"role": "user", "content": self.input})]
        for index, item in enumerate(self.input):
            field = f"input.{index}"
            match item.type:
                case "message":
                    turns.append((field, {"role": item.role, "content": _content(item.content)}))
                case "function_call_output":
                    answer = {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
                    turns.append((field, answer))
                case "function_call":
                    if not turns or turns[-1][1]["role"] != "assistant":
                        turns.append((field, {"role": "assistant", "content": None}))
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    turns[-1][1].setdefault("tool_calls", []).append(call)
        return turns


def _content(content: str | Iterable[TextItemPart] | None) -> Any:
    if content is None or isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


# --- responses ---


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """The answer. It may stand in the input of a following request as it is."""

    type: Literal["message"] = "message"
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(0, description="always 0: what the prefix cache saved is in the metrics only")
    cache_write_tokens: int = Field(0, description="always 0")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = Field(0, description="always 0: thoughts are a part of the text")


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails(cached_tokens=0, cache_write_tokens=0)
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails(reasoning_tokens=0)
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseBody(BaseModel):
    """An answer. Fields that OpenAI's clients expect and that are always the same here have their value as default."""

    id: str
    object: Literal["response"] = "response"
    created_at: int = Field(description="Unix time in seconds")
    status: Literal["in_progress", "completed", "incomplete"] = Field(
        description="`incomplete`: the text is as long as it may be, and has not come to its end"
    )
    model: str = Field(description="as the request named it")
    output: list[OutputMessage]
    usage: ResponseUsage | None = Field(None, description="null while it is in progress")
    incomplete_details: IncompleteDetails | None = None
    steering: SteeringBody | None = Field(None, description="what has steered the text; null while it is in progress")
    trace: list[TokenTraceBody] | None = None
    error: None = None
    instructions: str | None = None
    metadata: dict[str, str] = {}
    max_output_tokens: int | None = None
    temperature: float
    top_p: float
    previous_response_id: None = None
    parallel_tool_calls: bool = True
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    text: dict[str, Any] = {"format": {"type": "text"}}
