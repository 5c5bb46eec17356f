"""The HTTP application: routes, middleware, and one shape of errors."""

import asyncio
import logging
import re
import string
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import page, responses, routes, studies
from server.api.deps import credentials_of, require_api_key
from server.api.exception_handlers import (
    REQUEST_ID,
    add_exception_handlers,
    error_response,
    new_request_id,
    to_server_error,
)
from server.api.openai import routes as openai
from server.config import Settings
from server.errors import BodyTooLarge, ClientGone, Refused, ServerError, Unauthorized
from server.request_record import RequestRecord, open_record
from server.schemas import ErrorBody
from server.service import Service
from server.tracing import Tracing, open_tracing
from server.version import own_version
from steering.imports import importing

log = logging.getLogger("server.access")
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
HEALTH = ("/healthz", "/health", "/readyz")
PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LOGGED_PATH = 200  # characters of a path in the log


def create_app(settings: Settings) -> FastAPI:
    """A server whose model is loaded and whose engine runs in this process. Raises StartupError with one sentence."""
    with importing():
        from server.assembly import open_service

    tracing = open_tracing()
    service = open_service(settings)

    @asynccontextmanager
    async def engine() -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.client.stop)

    return app_of(service, engine, tracing)


def app_of(
    service: Service, of_engine: Callable[[], AbstractAsyncContextManager[None]], tracing: Tracing | None
) -> FastAPI:
    """The application of a service. `of_engine`: what begins and ends with it."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with of_engine():
            await responses.warm_up()
            yield
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = bare_app(lifespan=lifespan)
    app.state.service = app.state.changes = service
    add_exception_handlers(app)
    app.add_middleware(KeyEverywhere)
    app.add_middleware(TrailingSlash)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(RequestMiddleware, on_end=service.metrics.request, tracing=tracing)
    if origins := settings.cors_origins:  # the last one added is the outermost: every answer says who may read it
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "retry-after", "www-authenticate"],
        )
    return app


def bare_app(**options: Any) -> FastAPI:
    """The routes without a service: enough for the OpenAPI document. /docs needs no network."""
    app = FastAPIOffline(
        redoc_url=None,
        redirect_slashes=False,
        title="mat-steer",
        version=own_version(),
        responses=ERRORS,
        **options,
    )
    for router in (
        routes.generation,
        routes.checkpoints,
        openai.router,
        routes.tokens,
        routes.operations,
        studies.router,
        page.router,
    ):
        app.include_router(router)
    app.mount("/page", page.PageFiles())
    return app


class RequestMiddleware:
    """The outermost layer: gives each request an id (the client's X-Request-Id where it is plain) and a record, logs a
    line for it, and turns every exception into an error response."""

    def __init__(self, app: ASGIApp, on_end: Callable[[RequestRecord], None], tracing: Tracing | None = None) -> None:
        """`on_end` is called with the record of each request."""
        self._app = app
        self._on_end = on_end
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state, client = scope.setdefault("state", {}), scope.get("client")
        request_id = state["request_id"] = _own_id(scope) or new_request_id()
        record = RequestRecord(request_id, client[0] if client else None, scope["method"], _path(scope))
        record.started_ns, record.started = time.time_ns(), time.monotonic()
        open_record(record)
        complete = False

        async def tagged(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), request_id.encode())]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, tagged)
        except Exception as exception:
            log.exception("request %s failed", request_id, extra={"request_id": request_id})
            if record.status:  # half an answer is out; the server closes the connection
                record.outcome = to_server_error(exception).type
                raise
            response = error_response(to_server_error(exception), request_id, path=scope["path"])
            await response(scope, receive, tagged)
        finally:
            record.total_ms = round((time.monotonic() - record.started) * 1000, 3)
            record.route = getattr(scope.get("route"), "path", record.route)
            record.outcome = record.outcome or ("ok" if complete else ClientGone.type)
            if refusal := state.get("refusal"):  # the connection has answered before (server/protocol.py)
                record.status, record.outcome = refusal.status, refusal.type
            if self._tracing is not None:
                self._tracing.request(record, scope["headers"])
            log.info("%s", record.line(), extra=record.fields())
            self._on_end(record)


class KeyEverywhere:
    """Asks for a key at every path but those of health, where the settings say so; a route may want more."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service = scope["app"].state.service
        if scope["type"] == "http" and service.settings.api_key_everywhere and scope["path"] not in HEALTH:
            try:
                await require_api_key(service, await credentials_of(Request(scope)))
            except Unauthorized as error:
                await error_response(error, scope["state"]["request_id"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class TrailingSlash:
    """A path with a slash at its end means the same without: nobody is sent there with a 307, which not every client
    follows with its body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # In place: what the router adds to the scope is read by the layers outside. The log has the path as sent.
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes (413), by Content-Length or as they come, and compressed ones (415)."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if error := self._announced(scope):
            await error_response(error, scope["state"]["request_id"])(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise BodyTooLarge(f"The body has more than {self._limit} bytes.")
            return message

        await self._app(scope, counted, send)

    def _announced(self, scope: Scope) -> ServerError | None:
        """The error that the headers are enough for."""
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
    return quote(raw, safe=string.punctuation)[:LOGGED_PATH]


def _own_id(scope: Scope) -> str | None:
    given = _header(scope, REQUEST_ID.encode())
    return given if given is not None and PLAIN_ID.fullmatch(given) else None
