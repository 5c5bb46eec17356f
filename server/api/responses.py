"""How handlers answer: with one JSON body, or with server-sent events (WHATWG HTML, section 9.2)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse

from server.api.exception_handlers import error_json, to_server_error
from server.errors import ClientGone
from server.schemas import TOKEN_BODY, TokenBody
from server.types import GenerateResult, ResultStream, TokenChunk

T = TypeVar("T")
PIECE_BYTES = 64 * 2**10  # of a stream in one write
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # no proxy keeps tokens back


EVENT = {  # its schema in the OpenAPI document
    "title": "Event",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAMS: dict[int | str, dict[str, Any]] = {  # `responses` of the routes that can stream
    200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "the answer, or its events"}
}


async def json_response(request: Request, work: Coroutine[Any, Any, T], body: Callable[[T], BaseModel]) -> Response:
    """Awaits `work` and answers with `body` of its result. The body may be long, so a thread makes it.

    `work` is cancelled as soon as the client disconnects. Raises ClientGone then.
    """
    result = await _until_disconnect(request, work)
    return Response(await asyncio.to_thread(to_json, body, result), media_type="application/json")


def event_response(
    stream: ResultStream,
    token: Callable[[TokenChunk], TokenBody],
    body: Callable[[GenerateResult], BaseModel],
    request: Request,
) -> StreamingResponse:
    """`token` events, then `done` with the whole body, or `error`. Events that are ready together are sent together.
    A client that disconnects ends the stream, and with it the texts."""
    events = _events(stream, token, body, request.state.request_id)
    return sse_response(events)


def sse_response(events: AsyncIterator[str] | AsyncIterator[bytes]) -> StreamingResponse:
    """Events as they are to be sent."""
    return StreamingResponse(_pieces(events), media_type="text/event-stream", headers=HEADERS)


async def warm_up() -> None:
    """Reads nothing and streams it to nobody: what the first request in a process has to make or load (a thread, the
    codec of bodies, anyio's backend) is there for the first client."""

    async def events() -> AsyncIterator[bytes]:
        yield b""

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def send(message: MutableMapping[str, Any]) -> None:
        pass

    await asyncio.to_thread(b"{}".decode, "utf-8-sig")
    await sse_response(events())({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)


def data_response(chunks: AsyncIterator[Sequence[str]], request: Request) -> StreamingResponse:
    """OpenAI's stream: events without names, each a chunk in JSON; then `[DONE]`, or a chunk with `error`."""
    return sse_response(_data_events(chunks, request.state.request_id))


def to_json(body: Callable[[T], BaseModel], result: T) -> bytes:
    """Not on the event loop."""
    return body(result).model_dump_json().encode()


async def _pieces(events: AsyncIterator[str] | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """No piece is longer than `PIECE_BYTES`: the next one is sent when the client has read most of those before."""
    async for event in events:
        data = memoryview(event.encode() if isinstance(event, str) else event)
        for start in range(0, len(data), PIECE_BYTES):
            yield bytes(data[start : start + PIECE_BYTES])


async def _data_events(chunks: AsyncIterator[Sequence[str]], request_id: str) -> AsyncIterator[str]:
    try:
        async for ready in chunks:
            yield "".join(f"data: {chunk}\n\n" for chunk in ready)
    except Exception as exception:
        yield f"data: {error_json(to_server_error(exception), request_id)}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _events(
    stream: ResultStream,
    token: Callable[[TokenChunk], TokenBody],
    body: Callable[[GenerateResult], BaseModel],
    request_id: str,
) -> AsyncIterator[bytes]:
    try:
        async for ready in stream:
            if tokens := [
                _event(b"token", TOKEN_BODY.dump_json(token(item))) for item in ready if isinstance(item, TokenChunk)
            ]:
                yield b"".join(tokens)
            for result in (item for item in ready if isinstance(item, GenerateResult)):
                yield _event(b"done", await asyncio.to_thread(to_json, body, result))
    except Exception as exception:  # the status has been sent: an error can only be an event
        yield _event(b"error", error_json(to_server_error(exception), request_id).encode())


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client disconnected.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
