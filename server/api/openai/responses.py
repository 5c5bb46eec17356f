"""The bodies of the answers of the OpenAI routes, whole and in chunks."""

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, Field

from server.api.bodies import SteeringBody, TraceBody
from server.engine.types import FinishReason
from server.exchange import Answer, Result, Spelled, Spoken


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

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="where the token begins, in characters")

    @classmethod
    def of(
        cls, spoken: Iterable[Spoken], offset: int, first: str | None = None, text: str | None = None
    ) -> "CompletionLogprobs":
        """`first`: a token with nothing before it. `text`: that of all tokens, where some may not be part of it."""
        tokens: list[str] = [] if first is None else [first]
        logprobs: list[float | None] = [None] * len(tokens)
        tops: list[dict[str, float] | None] = [None] * len(tokens)
        for one in spoken:
            tokens.append(one.chosen.token)
            logprobs.append(one.chosen.logprob)
            # Several tokens may be spelled alike; the likeliest of them counts.
            tops.append({other.token: other.logprob for other in (one.chosen, *reversed(one.top))})
        offsets = [offset]
        for token in tokens[:-1]:
            shown = text is None or text.startswith(token, offsets[-1])
            offsets.append(offsets[-1] + (len(token) if shown else 0))
        return cls(tokens=tokens, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets[: len(tokens)])

    def __add__(self, other: "CompletionLogprobs") -> "CompletionLogprobs":
        return CompletionLogprobs(
            tokens=self.tokens + other.tokens,
            token_logprobs=self.token_logprobs + other.token_logprobs,
            top_logprobs=self.top_logprobs + other.top_logprobs,
            text_offset=self.text_offset + other.text_offset,
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


class ChatAlternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, spelled: Spelled) -> "ChatAlternative":
        return cls(token=spelled.token, logprob=spelled.logprob, bytes=[*spelled.token.encode()])


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


def traces(result: Result) -> list[TraceBody] | None:
    return None if result.trace is None else [TraceBody.of(one) for one in result.trace]
