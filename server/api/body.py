"""How a request's body is read: after its key has been checked, within bounds, and where it is long beside the event
loop.

FastAPI reads and parses a body before it looks at the dependencies of a route, and validates it on the event loop.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from itertools import accumulate
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.api.deps import credentials_of, require_admin_key, require_api_key
from server.api.exception_handlers import invalid_body, not_json
from server.errors import BadRequest, ClientGone, ServerError
from server.request_record import current_record

LONG_BYTES = 8 * 2**10  # parsed and validated in a thread: shorter ones take less than the way there
MAX_NESTING = 64  # lists and objects in each other
MAX_CONTAINERS = 2**15  # lists and objects
MAX_STRINGS = 2**16  # texts and names of fields
MAX_VALUES = 2**20  # of any kind: numbers cost little, and 256 prompts may be so many tokens
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class BodyRoute(APIRoute):
    """A route that checks its keys before it reads its body, which comes to FastAPI as the schema's object."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        wanted = {dependency.dependency for dependency in self.dependencies}
        keys = [check for check in (require_api_key, require_admin_key) if check in wanted]
        schema: TypeAdapter[Any] | None = None
        if self.body_field and self.body_field.field_info.annotation is not None:
            schema = TypeAdapter(self.body_field.field_info.annotation)

        async def handler(request: Request) -> Response:
            for check in keys:
                await check(request.app.state.service, await credentials_of(request))
            if schema is not None:
                request.app.state.service.keys.take_request(current_record().key)
            if schema is not None and (body := await _read(request)):
                if error := not_json(request):
                    raise error
                if len(body) <= LONG_BYTES:
                    value = parse_body(body, schema, request.url.path)
                else:
                    value = await asyncio.to_thread(parse_body, body, schema, request.url.path)
                request = _ReadRequest(request, body, value)
            return await handle(request)

        return handler


class _ReadRequest(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._read = body, value

    async def body(self) -> bytes:
        return self._read[0]

    async def json(self) -> Any:
        return self._read[1]


async def _read(request: Request) -> bytes:
    try:
        return await request.body()
    except ClientDisconnect:
        raise ClientGone("The client disconnected.") from None


def parse_body(body: bytes, schema: TypeAdapter[Any], path: str) -> Any:
    """The object that a route's schema makes of a body in JSON; `path` is the route's, for its errors.

    Raises BadRequest, InvalidField, UnsupportedField.
    """
    value = _parse(body)
    try:
        return schema.validate_python(value)
    except ValidationError as error:
        raise invalid_body(error, path) from None


def _parse(body: bytes) -> Any:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _unread("its body is not JSON in UTF-8") from None
    _check_size(body)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error.msg}, at character {error.pos}.") from None
    except ValueError:  # what is JSON, and yet more than Python reads
        raise _unread("its JSON holds a number with too many digits") from None


def _check_size(body: bytes) -> None:
    """Before anything is made of the JSON: that it is no more than can be parsed and validated in a moment. Of what is
    not JSON it says little; the parser does. Raises BadRequest."""
    if (
        body.count(b"[") + body.count(b"{") <= MAX_NESTING
        and body.count(b'"') <= MAX_STRINGS
        and body.count(b",") < MAX_VALUES
    ):
        return  # fewer than that, whatever of it stands in texts
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 2 * MAX_STRINGS:
        raise _unread(f"its JSON holds more than {MAX_STRINGS} texts and names of fields")
    without_texts = b"".join(unescaped.split(b'"')[::2])
    if without_texts.count(b",") >= MAX_VALUES:
        raise _unread(f"its JSON holds more than {MAX_VALUES} values")
    brackets = without_texts.translate(None, NOT_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise _unread(f"its JSON holds more than {MAX_CONTAINERS} lists and objects")
    if max(accumulate(map(STEP.__getitem__, brackets)), default=0) > MAX_NESTING:
        raise _unread(f"its JSON is nested too deeply: more than {MAX_NESTING} lists and objects in each other")


def _unread(why: str) -> ServerError:
    return BadRequest(f"The request cannot be read: {why}.")
