"""The outermost layer: a request id, one log line a request, and an answer even to what nobody foresaw."""

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.problems import error_of, render

log = logging.getLogger("server.access")
HEADER = "x-request-id"
OWN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestMiddleware:
    """Keeps a client's own X-Request-Id where it is plain; answers with it, logs it, and puts it into errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
            elapsed = (time.monotonic() - started) * 1000
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], scope["path"], status, elapsed)


def _own_id(scope: Scope) -> str | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == HEADER.encode() and OWN_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return None
