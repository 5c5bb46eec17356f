"""uvicorn's HTTP/1.1 protocol, with bounds on what a connection may send, how long it may take, and how many there are.

uvicorn itself bounds only how long a connection may be idle between two requests. Timeouts have nginx's names.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Literal

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.api.exception_handlers import REQUEST_ID, error_response, new_request_id
from server.config import Settings
from server.errors import Refused, ServerError

log = logging.getLogger(__name__)
MAX_HEAD_BYTES = 64 * 2**10  # of the request line and all headers; trailers count too
SLICE_BYTES = 16 * 2**10  # what the parser is given at once: a head that has no end is noticed so much later
HEAD_SLICE_BYTES = 2**10  # the same where requests begin: it holds no more than some dozens of them
WARN_EVERY_S = 60.0
# What a client still sends of a body that nobody wants is read away for so long: a connection that is closed before is
# reset by the system, and the answer lost with it.
LINGER_S = 5.0

# What a connection waits for: the client's first or next head, the rest of a head or of a body; that it reads what was
# sent; that it takes the last of it; that it stops sending. None: the server works on an answer.
Waiting = Literal["idle", "head", "body", "send", "close", "linger"] | None


class Connections:
    """What all connections share: their limits, and which of them are idle."""

    def __init__(self, settings: Settings, most: int, on_refusal: Callable[[ServerError], None]) -> None:
        """`most`: connections at once. `on_refusal`: called where a connection answers what never became a request."""
        self.most = most
        self.on_refusal = on_refusal
        self.seconds: dict[Waiting, float] = {
            "idle": settings.keepalive_timeout_s,
            "head": settings.client_header_timeout_s,
            "body": settings.client_body_timeout_s,
            "send": settings.send_timeout_s,
            "close": settings.send_timeout_s,
            "linger": LINGER_S,
        }
        self.idle: dict[BoundedProtocol, None] = {}  # no request is answered on them; the longest waiting first
        self._warned = -float("inf")

    def make_room(self, new: "BoundedProtocol") -> None:
        """Closes the connection that has been idle longest, or where none is idle the `new` one."""
        longest = next(iter(self.idle), new)
        if time.monotonic() - self._warned > WARN_EVERY_S:
            self._warned = time.monotonic()
            log.warning("more than %d connections (max_connections): those that are idle longest are closed", self.most)
        longest.abort()


class _Unfit(Exception):
    """Raised in a callback of the parser, which then stops."""


class _Flow(FlowControl):
    """Reads nothing while a client has sent requests that are not parsed yet, whoever waits for its body or its end:
    what it sends ahead is otherwise as long as it likes."""

    held = b""

    def hold(self, data: bytes) -> None:
        self.held = data
        self.pause_reading()

    def take(self) -> bytes:
        held, self.held = self.held, b""
        return held

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class _OfCycle:
    """A connection's transport, as uvicorn's cycle of a request has it: closed in the protocol's way."""

    def __init__(self, protocol: "BoundedProtocol") -> None:
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol.transport, name)

    def close(self) -> None:
        self._protocol.end()


class BoundedProtocol(HttpToolsProtocol):
    """A connection."""

    def __init__(self, others: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._others = others
        self._waiting: Waiting = None
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True  # a new connection owes a head
        self._in_body = False
        self._head_bytes = 0
        self._unparsed = 0  # bytes since the parser last told of something
        self._refusal: ServerError | None = None
        self._ended = False  # the last answer is out, and what comes is dropped

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        if len(self.connections) > self._others.most:
            self._others.make_room(self)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_for(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        data, start = self._flow.take() + data, 0
        while start < len(data) and not (self._ended or self.transport.is_closing()):
            if self.pipeline:  # as many requests as wait already are enough to parse ahead
                self._flow.hold(data[start:])
                break
            piece = data[start : start + (SLICE_BYTES if self._in_body else HEAD_SLICE_BYTES)]
            start += len(piece)
            self._unparsed += len(piece)
            super().data_received(piece)
            if self._head_bytes + self._unparsed > MAX_HEAD_BYTES and not self._refusal:
                self._refuse(_too_large())
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.flow.resume_reading()  # otherwise who works on a request does
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    # --- what uvicorn and its parser call ---

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._unparsed = True, 0, 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"))
        if self._in_head:  # a trailer is no header, and the application has the headers already
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()  # raises where the path cannot be read: this is no request then
        self._in_body = True
        if self.cycle is not None:  # not so for an upgrade
            self.cycle.transport = _OfCycle(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._head_bytes, self._unparsed = False, 0, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._ended:
            return
        super().on_response_complete()
        if self._flow.held and not self.pipeline:
            self.loop.call_soon(self.data_received, b"")
        self._watch()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or Refused("The request is not HTTP/1.1 as RFC 9112 has it.", 400))

    # --- ours ---

    def abort(self) -> None:
        """Closes without another word."""
        self._wait_for(None)
        self.transport.abort()

    def end(self) -> None:
        """Closes when the last answer is out, and the client has sent its body, or for long enough."""
        if self._in_body and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        self._ended = True
        self._flow.take()
        self.transport.write_eof()
        self.flow.resume_reading()
        self._watch()

    def _count(self, size: int) -> None:
        self._unparsed = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = _too_large()
            raise _Unfit

    def _refuse(self, error: ServerError) -> None:
        """Answers with `error` and closes; without an answer where another one is due before it, half out, or has been
        given already: a second one would pass for that of the next request."""
        self._refusal = error
        running = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (running and (self.cycle.response_started or not self._in_body)):
            self.abort()
            return
        if self._in_body and not running:
            self._linger()
            return
        if running:  # the application tells of it, in the log and in the metrics
            state = self.cycle.scope["state"]
            state["refusal"], request_id = error, state.get("request_id") or new_request_id()
        else:
            request_id = new_request_id()
            told = {"request_id": request_id, "status": error.status, "outcome": error.type}
            client = {"client": self.client[0]} if self.client else {}
            log.info("%s %d %s", request_id, error.status, error.message, extra=told | client)
            self._others.on_refusal(error)
        response = error_response(error, request_id)
        head = [
            *self.server_state.default_headers,
            *response.raw_headers,
            (b"connection", b"close"),
            (REQUEST_ID.encode(), request_id.encode()),
        ]
        lines = b"".join(b"%b: %b\r\n" % header for header in head)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[error.status], lines, bytes(response.body)))
        if running:
            self.cycle.disconnected = True  # the application's answer comes too late
            self.cycle.message_event.set()
        self._linger()

    def _watch(self) -> None:
        """Starts the timer of what the connection waits for by now, if that is another thing than before."""
        idle = self.cycle is None or self.cycle.response_complete
        waiting: Waiting
        if self.transport.is_closing():
            waiting = "close"
        elif self._ended:
            waiting = "linger"
        elif self.flow.write_paused:
            waiting = "send"
        elif self._in_body:
            waiting = "body"
        elif idle:
            waiting = "head" if self._in_head else "idle"
        else:
            waiting = None
        if waiting != self._waiting:
            self._wait_for(waiting)

    def _wait_for(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._others.idle.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if waiting is not None:
            self._timer = self.loop.call_later(self._others.seconds[waiting], self._expired)
            if waiting != "send":
                self._others.idle[self] = None

    def _expired(self) -> None:
        match self._waiting:
            case "body":
                self._refuse(Refused("The request's body took too long to come.", 408))
            case "head" if self._head_bytes or self._unparsed:
                self._refuse(Refused("The request's headers took too long to come.", 408))
            case "head" | "idle":
                self.transport.close()
                self._watch()
            case _:
                self.abort()


def _too_large() -> ServerError:
    return Refused(f"The request's headers have more than {MAX_HEAD_BYTES} bytes.", 431)
