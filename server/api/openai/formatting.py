"""Response bodies of the OpenAI routes, whole or in the chunks of a stream, made from the engine's numbers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from server.api.openai.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChatTokenLogprob,
    Choice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    TopLogprob,
    Usage,
)
from server.engine.sequence import Finished, Sequence, TokenLogprob
from server.formatting import finite, steering, token_trace, trace
from server.schemas import TokenTraceBody
from server.tokenizer import Codec, TextOffsets
from server.types import ArmResult, EchoedPrompt, GenerateResult, ResultStream, TokenChunk

C = TypeVar("C", bound=Choice)
Body = TypeVar("Body", bound=BaseModel, covariant=True)


class OpenAIFormatter(Protocol[Body]):
    """One request's response: `response`, or as a stream the chunks of the other methods, in this order."""

    def response(self, result: GenerateResult) -> Body: ...

    def first(self) -> Iterator[BaseModel]:
        """Chunks before anything is known."""

    def prompt(self, index: int, prompt: EchoedPrompt) -> Iterator[BaseModel]:
        """Chunks of an echoed prompt. May take long: not on the event loop."""

    def token(self, chunk: TokenChunk) -> Iterator[BaseModel]:
        """The chunk of a token; none where there is no text yet, nor anything else that was asked for."""

    def last(self, result: GenerateResult) -> Iterator[BaseModel]:
        """How each text has ended, and usage."""


async def stream_chunks(stream: ResultStream, formatter: OpenAIFormatter[BaseModel]) -> AsyncIterator[list[str]]:
    """The chunks of a stream in JSON; those that are ready together come together."""
    prompts = 0
    if first := _to_json(formatter.first()):
        yield first
    async for ready in stream:
        chunks: list[str] = []
        for item in ready:
            match item:
                case EchoedPrompt():
                    chunks += await asyncio.to_thread(_prompt_json, formatter, prompts, item)
                    prompts += 1
                case TokenChunk():
                    chunks += _to_json(formatter.token(item))
                case GenerateResult():
                    chunks += _to_json(formatter.last(item))
        if chunks:
            yield chunks


@dataclass
class CompletionFormatter:
    """/v1/completions. `head`: the fields that every body begins with."""

    request: CompletionRequest
    head: Mapping[str, Any]
    codec: Codec
    _prompts: dict[int, int] = field(default_factory=dict)  # by choice: characters of the echoed prompt before it
    _offsets: dict[int, TextOffsets] = field(default_factory=dict)  # by choice

    def response(self, result: GenerateResult) -> Completion:
        (arm,) = result.arms
        prompts = [format_prompt(self.codec, prompt) for prompt in result.prompts]
        choices = []
        for index, text in enumerate(arm.texts):
            before, logprobs = prompts[index // self.request.n] if prompts else ("", None)
            if text.sequence.sampling_params.logprobs is not None:
                offsets = _offsets(self.codec, text.sequence)
                own = completion_logprobs(self.codec, _logprobs(text), _shifted(offsets, len(before)))
                logprobs = own if logprobs is None else _joined(logprobs, own)
            choices.append(
                _ended(
                    CompletionChoice(
                        index=index, text=before + text.text, logprobs=logprobs, trace=trace(self.codec, text)
                    ),
                    text,
                    arm,
                )
            )
        return self._body(choices, usage=_usage(result, self.request.n))

    def first(self) -> Iterator[Completion]:
        yield from ()

    def prompt(self, index: int, prompt: EchoedPrompt) -> Iterator[Completion]:
        text, logprobs = format_prompt(self.codec, prompt)
        for choice in range(index * self.request.n, (index + 1) * self.request.n):
            self._prompts[choice] = len(text)
            yield self._body([CompletionChoice(index=choice, text=text, logprobs=logprobs)])

    def token(self, chunk: TokenChunk) -> Iterator[Completion]:
        logprobs, one, index = None, chunk.event.token.logprob, chunk.index
        if one is not None:
            if index not in self._offsets:
                self._offsets[index] = _offsets(self.codec, chunk.event.sequence)
            offset = _shifted(self._offsets[index], self._prompts.get(index, 0))
            logprobs = completion_logprobs(self.codec, [one], offset)
        traced = _trace(self.codec, chunk)
        if chunk.event.text or logprobs or traced:
            yield self._body([CompletionChoice(index=index, text=chunk.event.text, logprobs=logprobs, trace=traced)])

    def last(self, result: GenerateResult) -> Iterator[Completion]:
        (arm,) = result.arms
        for index, text in enumerate(arm.texts):
            yield self._body([_ended(CompletionChoice(index=index, text=""), text, arm)])
        if self.request.usage_is_streamed:
            yield self._body([], usage=_usage(result, self.request.n))

    def _body(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(**self.head, choices=choices, usage=usage)


@dataclass
class ChatFormatter:
    """/v1/chat/completions. `head`: the fields that every body begins with."""

    request: ChatCompletionRequest
    head: Mapping[str, Any]
    codec: Codec

    def response(self, result: GenerateResult) -> ChatCompletion:
        (arm,) = result.arms
        choices = []
        for index, text in enumerate(arm.texts):
            logprobs = None
            if text.sequence.sampling_params.logprobs is not None:
                logprobs = chat_logprobs(self.codec, _logprobs(text))
            message = AssistantMessage(content=text.text)
            choice = ChatChoice(index=index, message=message, logprobs=logprobs, trace=trace(self.codec, text))
            choices.append(_ended(choice, text, arm))
        return ChatCompletion(**self.head, choices=choices, usage=_usage(result, self.request.n))

    def first(self) -> Iterator[ChatCompletionChunk]:
        for index in range(self.request.n):
            yield self._chunk([ChatChunkChoice(index=index, delta=Delta(role="assistant", content=""))])

    def prompt(self, index: int, prompt: EchoedPrompt) -> Iterator[ChatCompletionChunk]:
        yield from ()

    def token(self, chunk: TokenChunk) -> Iterator[ChatCompletionChunk]:
        one, text = chunk.event.token.logprob, chunk.event.text
        logprobs = None if one is None else chat_logprobs(self.codec, [one])
        traced = _trace(self.codec, chunk)
        if text or logprobs or traced:
            delta = Delta(content=text)
            yield self._chunk([ChatChunkChoice(index=chunk.index, delta=delta, logprobs=logprobs, trace=traced)])

    def last(self, result: GenerateResult) -> Iterator[ChatCompletionChunk]:
        (arm,) = result.arms
        for index, text in enumerate(arm.texts):
            yield self._chunk([_ended(ChatChunkChoice(index=index, delta=Delta()), text, arm)])
        if self.request.usage_is_streamed:
            yield self._chunk([], usage=_usage(result, self.request.n))

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self.head, choices=choices, usage=usage)


def completion_logprobs(
    codec: Codec, logprobs: Iterable[TokenLogprob], offset: Callable[[int], int]
) -> CompletionLogprobs:
    """`offset`: where a token begins in the choice's text; called once for each token, in order."""
    lists = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for one in logprobs:
        name, logprob = token_name(codec, one.token_id), finite(one.logprob)
        top = {name: logprob}
        # Several tokens may have one name; the likeliest of them counts.
        for other, its in zip(reversed(one.top_token_ids), reversed(one.top_logprobs), strict=True):
            top[token_name(codec, other)] = finite(its)
        lists.tokens.append(name)
        lists.token_logprobs.append(logprob)
        lists.top_logprobs.append(top)
        lists.text_offset.append(offset(one.token_id))
    return lists


def chat_logprobs(codec: Codec, logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
    def fields(token: int, logprob: float) -> tuple[str, float, list[int] | None]:
        text, raw = codec.token_text(token)
        return text, finite(logprob), None if raw is None else [*raw]

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                *fields(one.token_id, one.logprob),
                [TopLogprob(*fields(*top)) for top in zip(one.top_token_ids, one.top_logprobs, strict=True)],
            )
            for one in logprobs
        ]
    )


def format_prompt(codec: Codec, prompt: EchoedPrompt) -> tuple[str, CompletionLogprobs | None]:
    """An echoed prompt's text, as it was given, and the log-probabilities of its tokens where they are asked for."""
    decoded = codec.decode_all(prompt.tokens)
    text = prompt.prompt if isinstance(prompt.prompt, str) else decoded
    if prompt.logprobs is None:
        return text, None
    first, offsets = prompt.tokens[0], TextOffsets(codec, (), special=True)
    offsets.next(first)
    added = max(0, decoded.find(text))  # characters that the tokenizer has put before the text

    def offset(token: int) -> int:
        return min(max(0, offsets.next(token) - added), len(text))

    nothing_before = CompletionLogprobs(
        tokens=[token_name(codec, first)], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
    )
    return text, _joined(nothing_before, completion_logprobs(codec, prompt.logprobs, offset))


def token_name(codec: Codec, token: int) -> str:
    """A token's text; of a part of a character its bytes, as in `bytes:\\xe6\\x9d`, so that names differ."""
    text, raw = codec.token_text(token)
    if raw is None or raw == text.encode():
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _offsets(codec: Codec, sequence: Sequence) -> TextOffsets:
    return TextOffsets(codec, sequence.prompt_token_ids, special=not sequence.sampling_params.skip_special_tokens)


def _shifted(offsets: TextOffsets, characters: int) -> Callable[[int], int]:
    return lambda token: characters + offsets.next(token)


def _logprobs(text: Finished) -> Iterator[TokenLogprob]:
    return (one.logprob for one in text.tokens if one.logprob)


def _trace(codec: Codec, chunk: TokenChunk) -> list[TokenTraceBody] | None:
    return [token_trace(codec, chunk.event.token)] if chunk.event.sequence.trace else None


def _usage(result: GenerateResult, n: int) -> Usage:
    """A prompt counts once, however many texts it has."""
    texts = result.arms[0].texts
    prompts = sum(len(text.sequence.prompt_token_ids) for text in texts[::n])
    completions = sum(len(text.token_ids) for text in texts)
    return Usage(prompt_tokens=prompts, completion_tokens=completions, total_tokens=prompts + completions)


def _ended(choice: C, text: Finished, arm: ArmResult) -> C:
    """With what is known when a text has ended."""
    choice.finish_reason, choice.steering = text.finish_reason, steering(text, arm)
    return choice


def _prompt_json(formatter: OpenAIFormatter[BaseModel], index: int, prompt: EchoedPrompt) -> list[str]:
    return _to_json(formatter.prompt(index, prompt))


def _to_json(bodies: Iterable[BaseModel]) -> list[str]:
    return [body.model_dump_json() for body in bodies]
