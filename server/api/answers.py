"""How a request gets its answer whole: given up when nobody waits for it any more, and written beside the event loop,
since an answer with many log-probabilities or a trace takes long to write."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.errors import ClientGone

T = TypeVar("T")


async def answered(request: Request, work: Coroutine[Any, Any, T], body: Callable[[T], BaseModel]) -> Response:
    """The result of `work` as the `body` of a response. `work` is cancelled as soon as the client disconnects (then:
    ClientGone)."""
    result = await _unless_gone(request, work)
    return Response(await asyncio.to_thread(written, body, result), media_type="application/json")


def written(body: Callable[[T], BaseModel], result: T) -> str:
    """JSON; not for the event loop."""
    return body(result).model_dump_json()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client disconnected.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
