"""Server-sent events (WHATWG HTML, section 9.2): what a stream sends, and how it ends."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from server.api.answers import written
from server.api.bodies import TokenBody
from server.api.problems import error_of, spell
from server.exchange import Answer, Stream, Told

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nobody between keeps tokens back


EVENT = {  # the schema of each, as checkers of OpenAPI read it
    "title": "Event",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
STREAMS: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "the answer, or its events"}
}


def event_stream(told: Stream, whole: Callable[[Answer], BaseModel], request: Request) -> StreamingResponse:
    """`token` events, then one `done` with the `whole` response, or one `error`. A client that leaves ends the rows.
    What comes together is sent together."""
    return StreamingResponse(
        _events(told, whole, request.state.request_id), media_type="text/event-stream", headers=HEADERS
    )


def data_stream(chunks: AsyncIterator[Sequence[str]], request: Request) -> StreamingResponse:
    """Events without names, as OpenAI sends them: the chunks (JSON), then `[DONE]`, or one with an `error`."""
    return StreamingResponse(_data(chunks, request.state.request_id), media_type="text/event-stream", headers=HEADERS)


async def _data(chunks: AsyncIterator[Sequence[str]], request_id: str) -> AsyncIterator[str]:
    try:
        async for some in chunks:
            yield "".join(f"data: {chunk}\n\n" for chunk in some)
    except Exception as exception:
        yield f"data: {spell(error_of(exception), request_id)}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _events(told: Stream, whole: Callable[[Answer], BaseModel], request_id: str) -> AsyncIterator[str]:
    try:
        async for some in told:
            if tokens := [
                _event("token", TokenBody.of(one).model_dump_json()) for one in some if isinstance(one, Told)
            ]:
                yield "".join(tokens)
            for answer in (one for one in some if isinstance(one, Answer)):
                yield _event("done", await asyncio.to_thread(written, whole, answer))
    except Exception as exception:  # the status has been sent: an error can only be an event
        yield _event("error", spell(error_of(exception), request_id))


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
