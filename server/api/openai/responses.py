"""The bodies of the answers of the OpenAI routes, whole and in chunks."""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from server.api.bodies import SteeringBody, TraceBody
from server.engine.types import FinishReason
from server.exchange import Answer, Result, Spelled, Spoken
from server.tokenizer import TokenText


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, answer: Answer, n: int) -> "Usage":
        """Prompts count once, however many texts they get."""
        results = answer.arms[0].results
        prompts = sum(result.prompt_tokens for result in results[::n])
        completions = sum(len(result.token_ids) for result in results)
        return cls(prompt_tokens=prompts, completion_tokens=completions, total_tokens=prompts + completions)


class Choice(BaseModel):
    """One text, or a piece of it. `steering` says what has steered it, with the last piece."""

    index: int
    finish_reason: FinishReason | None = None
    steering: SteeringBody | None = None
    trace: list[TraceBody] | None = None


class CompletionLogprobs(BaseModel):
    """Lists that go along with each other, an entry for a token."""

    tokens: list[str] = Field(description="a part of a character is spelled by its bytes, as in `bytes:\\xe6\\x9d`")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(
        description="how many characters stand before the token; those of a stop string are listed, too"
    )

    @classmethod
    def of(cls, spoken: Iterable[Spoken], begin: int, first: TokenText | None = None) -> "CompletionLogprobs":
        """`begin`: the characters before the tokens. `first`: a token with nothing before it."""
        lists = cls(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if first is not None:
            lists._append(_named(first), None, None, begin)
        for one in spoken:
            # Several tokens may be spelled alike; the likeliest of them counts.
            top = {_named(other.spelling): other.logprob for other in (one.chosen, *reversed(one.top))}
            lists._append(_named(one.chosen.spelling), one.chosen.logprob, top, begin + (one.offset or 0))
        return lists

    def __add__(self, other: "CompletionLogprobs") -> "CompletionLogprobs":
        return CompletionLogprobs(
            tokens=self.tokens + other.tokens,
            token_logprobs=self.token_logprobs + other.token_logprobs,
            top_logprobs=self.top_logprobs + other.top_logprobs,
            text_offset=self.text_offset + other.text_offset,
        )

    def _append(self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int) -> None:
        self.tokens.append(token)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)


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


class ChatAlternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="of a part of a character its own; null: they are not known")

    @classmethod
    def of(cls, spelled: Spelled) -> "ChatAlternative":
        text, raw = spelled.spelling
        return cls(token=text, logprob=spelled.logprob, bytes=None if raw is None else [*raw])


class ChatToken(ChatAlternative):
    top_logprobs: list[ChatAlternative]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]

    @classmethod
    def of(cls, spoken: Sequence[Spoken]) -> "ChatLogprobs":
        return cls(
            content=[
                ChatToken(
                    **vars(ChatAlternative.of(one.chosen)), top_logprobs=[ChatAlternative.of(top) for top in one.top]
                )
                for one in spoken
            ]
        )


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None


class ChatCompletion(_Body):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class DeltaChoice(Choice):
    delta: Delta
    logprobs: ChatLogprobs | None = None


class ChatChunk(_Body):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[DeltaChoice]


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when it was loaded, Unix time in seconds")
    owned_by: Literal["mat-steer"] = "mat-steer"
    root: str = Field(description="the base model")
    attributes: dict[str, float] = Field(description="default multipliers; none for the base model")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


def _named(spelling: TokenText) -> str:
    """As OpenAI's older route names tokens, so that two parts of characters have two names."""
    text, raw = spelling
    if raw is None or raw == text.encode():
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def traces(result: Result) -> list[TraceBody] | None:
    return None if result.trace is None else [TraceBody.of(one) for one in result.trace]
