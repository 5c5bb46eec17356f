"""How an answer is written: whole, or in the chunks of a stream."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from server.api.bodies import SteeringBody, TraceBody
from server.api.openai.requests import ChatRequest, CompletionRequest
from server.api.openai.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    Choice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    DeltaChoice,
    Usage,
    traces,
)
from server.exchange import Answer, Echo, Result, Stream, Told

C = TypeVar("C", bound=Choice)
Whole = TypeVar("Whole", bound=BaseModel, covariant=True)


class Writer(Protocol[Whole]):
    def whole(self, answer: Answer) -> Whole: ...

    def opening(self) -> Iterator[BaseModel]:
        """Chunks before anything is known."""

    def echo(self, prompt: int, echo: Echo) -> Iterator[BaseModel]:
        """Chunks of the prompt of that index."""

    def piece(self, told: Told) -> Iterator[BaseModel]:
        """Chunks of a token: none where it has nothing to say."""

    def last(self, answer: Answer) -> Iterator[BaseModel]:
        """How the texts have ended."""


async def chunks(told: Stream, writer: Writer[BaseModel]) -> AsyncIterator[list[str]]:
    """A stream as the writer writes it, in JSON."""
    prompts = 0
    if opening := _json(writer.opening()):
        yield opening
    async for some in told:
        written: list[str] = []
        for one in some:
            match one:
                case Echo():  # may be long
                    written += await asyncio.to_thread(_json, writer.echo(prompts, one))
                    prompts += 1
                case Told():
                    written += _json(writer.piece(one))
                case Answer():
                    written += _json(writer.last(one))
        if written:
            yield written


@dataclass
class CompletionWriter:
    """Texts as they are. `head`: what every body begins with."""

    request: CompletionRequest
    head: Mapping[str, Any]
    _begin: dict[int, int] = field(default_factory=dict)  # by choice: characters of its prompt that stand before it

    def whole(self, answer: Answer) -> Completion:
        choices = []
        for index, result in enumerate(answer.arms[0].results):
            echo = answer.echoes[index // self.request.n] if answer.echoes else None
            before = echo.text if echo else ""
            logprobs = None
            if result.logprobs is not None:
                logprobs = CompletionLogprobs.of(result.logprobs, len(before))
                if echo and echo.spoken is not None:
                    logprobs = CompletionLogprobs.of(echo.spoken, 0, echo.first) + logprobs
            choice = CompletionChoice(index=index, text=before + result.text, logprobs=logprobs, trace=traces(result))
            choices.append(_ended(choice, result))
        return self._body(choices, usage=Usage.of(answer, self.request.n))

    def opening(self) -> Iterator[Completion]:
        yield from ()

    def echo(self, prompt: int, echo: Echo) -> Iterator[Completion]:
        logprobs = None if echo.spoken is None else CompletionLogprobs.of(echo.spoken, 0, echo.first)
        for index in range(prompt * self.request.n, (prompt + 1) * self.request.n):
            self._begin[index] = len(echo.text)
            yield self._body([CompletionChoice(index=index, text=echo.text, logprobs=logprobs)])

    def piece(self, told: Told) -> Iterator[Completion]:
        logprobs = None
        if told.logprob is not None:
            logprobs = CompletionLogprobs.of([told.logprob], self._begin.get(told.index, 0))
        if told.text or logprobs or told.trace:
            yield self._body(
                [CompletionChoice(index=told.index, text=told.text, logprobs=logprobs, trace=_trace(told))]
            )

    def last(self, answer: Answer) -> Iterator[Completion]:
        for index, result in enumerate(answer.arms[0].results):
            yield self._body([_ended(CompletionChoice(index=index, text=""), result)])
        if self.request.usage_is_streamed:
            yield self._body([], usage=Usage.of(answer, self.request.n))

    def _body(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**self.head, choices=choices, usage=usage)


@dataclass
class ChatWriter:
    """Texts as the assistant's messages."""

    request: ChatRequest
    head: Mapping[str, Any]

    def whole(self, answer: Answer) -> ChatCompletion:
        choices = []
        for index, result in enumerate(answer.arms[0].results):
            logprobs = None if result.logprobs is None else ChatLogprobs.of(result.logprobs)
            message = AnswerMessage(content=result.text)
            choice = ChatChoice(index=index, message=message, logprobs=logprobs, trace=traces(result))
            choices.append(_ended(choice, result))
        return ChatCompletion(**self.head, choices=choices, usage=Usage.of(answer, self.request.n))

    def opening(self) -> Iterator[ChatChunk]:
        for index in range(self.request.n):
            yield self._chunk([DeltaChoice(index=index, delta=Delta(role="assistant", content=""))])

    def echo(self, prompt: int, echo: Echo) -> Iterator[ChatChunk]:
        yield from ()

    def piece(self, told: Told) -> Iterator[ChatChunk]:
        logprobs = None if told.logprob is None else ChatLogprobs.of([told.logprob])
        if told.text or logprobs or told.trace:
            delta = Delta(content=told.text)
            yield self._chunk([DeltaChoice(index=told.index, delta=delta, logprobs=logprobs, trace=_trace(told))])

    def last(self, answer: Answer) -> Iterator[ChatChunk]:
        for index, result in enumerate(answer.arms[0].results):
            yield self._chunk([_ended(DeltaChoice(index=index, delta=Delta()), result)])
        if self.request.usage_is_streamed:
            yield self._chunk([], usage=Usage.of(answer, self.request.n))

    def _chunk(self, choices: list[DeltaChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(**self.head, choices=choices, usage=usage)


def _json(bodies: Iterable[BaseModel]) -> list[str]:
    return [body.model_dump_json() for body in bodies]


def _ended(choice: C, result: Result) -> C:
    """With what is known of a text when it has ended."""
    choice.finish_reason, choice.steering = result.reason, SteeringBody.of(result.steering)
    return choice


def _trace(told: Told) -> list[TraceBody] | None:
    return None if told.trace is None else [TraceBody.of(told.trace)]
