"""The outermost layers: a request id, one log line a request, an answer even to what nobody foresaw, a body limit."""

import logging
import re
import secrets
import string
import time
from collections.abc import Callable
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.problems import error_of, render
from server.errors import BodyTooLarge, Refused, ServerError

log = logging.getLogger("server.access")
HEADER = "x-request-id"
OWN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LOGGED = 200  # characters of a path in the log


class RequestMiddleware:
    """Keeps a client's own X-Request-Id where it is plain; answers with it, logs it, and puts it into errors."""

    def __init__(self, app: ASGIApp, on_end: Callable[[str, int, float], None]) -> None:
        """`on_end` is told route, status and seconds of every request; status 0: the client went before it had one."""
        self._app = app
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _own_id(scope) or f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (HEADER.encode(), request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except Exception as exception:
            log.exception("request %s failed", request_id)
            if status:  # half an answer is out; the server closes the connection
                raise
            await render(error_of(exception), request_id)(scope, receive, tagged)
        finally:
            elapsed = time.monotonic() - started
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], _path(scope), status, elapsed * 1000)
            self._on_end(getattr(scope.get("route"), "path", "other"), status, elapsed)


class BodyLimit:
    """Answers 413 to a body of more than `limit` bytes, whether the client says its length or only sends it, and 415 to
    one that is compressed."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if error := self._announced(scope):
            await render(error, scope["state"]["request_id"])(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                # The framework lets only its own exceptions through while it reads a body.
                raise HTTPException(BodyTooLarge.status, f"The body has more than {self._limit} bytes.")
            return message

        await self._app(scope, counted, send)

    def _announced(self, scope: Scope) -> ServerError | None:
        """What the headers say that is not taken."""
        encoding = _header(scope, b"content-encoding") or "identity"
        if encoding.lower() != "identity":
            return Refused(f"A body with 'Content-Encoding: {encoding[:20]}' is not taken; send it as it is.", 415)
        length = _header(scope, b"content-length") or ""
        # Digits beyond these twenty would be a number that takes long to read.
        if length.isdecimal() and (len(length) > 20 or int(length) > self._limit):
            return BodyTooLarge(f"The body has {length[:20]} bytes; at most {self._limit} are taken.")
        return None


def _header(scope: Scope, wanted: bytes) -> str | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value.decode("latin-1") for name, value in headers if name == wanted), None)


def _path(scope: Scope) -> str:
    """The path as it was sent, in printable ASCII: nothing that a client sends can begin a line of the log."""
    raw = scope.get("raw_path") or scope["path"].encode(errors="replace")
    return quote(raw, safe=string.punctuation)[:LOGGED]


def _own_id(scope: Scope) -> str | None:
    given = _header(scope, HEADER.encode())
    return given if given is not None and OWN_ID.fullmatch(given) else None
