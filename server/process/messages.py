"""What the processes say to each other: MessagePack (msgspec) in frames of known length, over a Unix socket."""

import asyncio
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, get_type_hints

import msgspec
from pydantic import BaseModel

from server import errors
from server.engine.sequence import FinishReason, Progress, SampledToken, Timing
from server.engine_client import EngineClient
from server.errors import ServerError

LENGTH = struct.Struct("<Q")  # before each frame, bytes
CALLS = {  # that need nothing but their arguments; the types of those and of what they return are read from them
    method.__name__: method
    for method in (
        EngineClient.prompt_logprobs,
        EngineClient.compare,
        EngineClient.score,
        EngineClient.checkpoints,
        EngineClient.find_checkpoint,
        EngineClient.reload,
        EngineClient.unload,
        EngineClient.snapshot,
    )
}


class Message(msgspec.Struct, array_like=True, tag=True):
    """Tagged by its class."""


# --- from a front ---------------------------------------------------------------------------------


class Call(Message):
    """A method is called; a Reply has the same `id`. Events name a request by the `id` of its `submit`."""

    id: int
    method: str
    arguments: bytes


class CancelCall(Message):
    """Nobody waits for the reply any more."""

    id: int


class Cancel(Message):
    request_id: str


class Close(Message):
    request_id: str


class StopSequence(Message):
    """A stop string is complete."""

    request_id: str
    index: int


FromFront = Call | CancelCall | Cancel | Close | StopSequence


# --- from the engine ------------------------------------------------------------------------------


class Error(Message):
    """A ServerError."""

    kind: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: ServerError) -> "Error":
        return cls(type(error).__name__, vars(error))

    def to_exception(self) -> ServerError:
        kind: type[ServerError] = getattr(errors, self.kind, ServerError)
        error = kind.__new__(kind, self.fields["message"])
        vars(error).update(self.fields)
        return error


class Reply(Message):
    id: int
    result: bytes = b""
    error: Error | None = None


class DetailedToken(Message):
    """A token with more to say than its id."""

    request: int
    index: int  # of its sequence
    token: SampledToken
    progress: Progress | None


class Ended(Message):
    """A sequence's last event: it has failed where there is an error. Tokens are those that were not sent before."""

    request: int
    index: int
    error: Error | None = None
    finish_reason: FinishReason = "stop"
    steered_tokens: int = 0
    timing: Timing | None = None
    token_ids: tuple[int, ...] = ()
    tokens: tuple[SampledToken, ...] = ()  # in place of their ids, where they have more to say


class Events(Message):
    """What a step has given the requests of one front."""

    tokens: list[int]  # three numbers for each: request, index of the sequence, token id
    detailed: list[DetailedToken]
    ended: list[Ended]


FromEngine = Reply | Events


# --- encoding -------------------------------------------------------------------------------------


def _encode_other(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    raise NotImplementedError(f"{type(value).__name__} is no plain data")


def _decode_other(kind: type, value: Any) -> Any:
    if issubclass(kind, BaseModel):
        return kind.model_validate_json(value)
    raise NotImplementedError(f"{kind.__name__} is no plain data")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
encode: Callable[[Any], bytes] = _encoder.encode


@cache
def _decoder(kind: Any) -> "msgspec.msgpack.Decoder[Any]":
    return msgspec.msgpack.Decoder(kind, dec_hook=_decode_other)


def decode(data: bytes, kind: Any) -> Any:
    """Raises msgspec.DecodeError for what is not of that type."""
    return _decoder(kind).decode(data)


@cache
def types_of(method: Callable[..., Any]) -> tuple[Any, Any]:
    """Of the arguments of one of `EngineClient`'s methods, together, and of what it returns."""
    hints = get_type_hints(method)
    result = hints.pop("return")
    return tuple[tuple(hints.values())] if hints else tuple[()], result  # type: ignore[misc]


def frame(message: Message) -> bytes:
    """A message as it is sent."""
    data = encode(message)
    return LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next message. Raises OSError or asyncio.IncompleteReadError where the other side is gone."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(length)
