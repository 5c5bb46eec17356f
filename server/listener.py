"""uvicorn with a socket that is bound before the model is loaded, and a shutdown that drains."""

import asyncio
import errno
import gc
import logging
import math
import os
import socket
import sys
import threading
from functools import partial
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.config import Settings
from server.errors import StartupError
from server.protocol import BoundedProtocol, Connections
from server.service import Service
from server.web import home

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)
LAST_WORDS_S = 0.5  # after the drain: for clients to read that their request has failed
FORCED_S = 1.5  # after the drain: the end of the process
OTHER_FILES = 128  # that the process has open beside its connections
BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it


def listen(settings: Settings) -> socket.socket:
    """A bound socket; it takes connections once the server runs. Raises StartupError."""
    where = f"{settings.host} port {settings.port}"
    try:
        bound = _bind(settings.host, settings.port)
    except (OSError, UnicodeError) as error:  # the second for a host that no name may be
        raise _cannot_listen(where, error) from error
    if not settings.asks_for_key and not ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
        log.warning(
            "%s can be reached from other machines, and the server asks nobody for a key: set MATSTEER_API_KEY", where
        )
    return bound


def _cannot_listen(where: str, error: Exception) -> StartupError:
    why = error.strerror if isinstance(error, OSError) else error
    advice = ""
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
        taken = error.errno == errno.EADDRINUSE
        advice = " Another server has this port: stop it, or choose" if taken else " Choose"
        advice += " another port with --port (MATSTEER_PORT); for make serve: `make serve PORT=8001`."
    return StartupError(f"The server cannot listen on {where}: {why}.{advice}")


def address_of(bound: socket.socket) -> str:
    """The URL at which a browser on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    ip = ip_address(host.partition("%")[0])
    if ip.is_unspecified:  # all addresses: a browser can open none of that name
        host = "127.0.0.1" if ip.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ip.version == 6 else f"http://{host}:{port}"


def where_to_go(service: Service, address: str) -> str:
    """What a user can open and send, once the server runs."""
    active = service.registry.active
    command = home.curl(address, active.defaults if active else {}, asks_for_key=service.settings.asks_for_key)
    return (
        f"ready at {address}\n"
        f"  page    {address}/\n"
        f"  API     {address}/docs, for OpenAI's clients {address}/v1\n"
        f"  try     {command}"
    )


def _bind(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        # Otherwise closed connections of a server that has just stopped block the address for a minute.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def run(app: FastAPI, bound: socket.socket, *, drain_s: float) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once."""
    # The garbage collector need not look at the model and the libraries again: that would stop every stream for long.
    try:
        bound.listen(BACKLOG)
    except OSError as error:  # another server had bound the port as well, and was faster; uvloop would say nothing
        service: Service = app.state.service
        service.engine.stop()
        raise _cannot_listen(address_of(bound), error) from error
    gc.collect()
    gc.freeze()
    DrainingServer(app, drain_s=drain_s).run(sockets=[bound])


class DrainingServer(uvicorn.Server):
    """At shutdown takes no new requests; running ones have `drain_s` seconds to finish, then they end with a 503."""

    def __init__(self, app: FastAPI, *, drain_s: float) -> None:
        service: Service = app.state.service
        connections = Connections(service.settings, _allowed(service.settings.max_connections))
        config = uvicorn.Config(
            app,
            http=partial(BoundedProtocol, connections),  # type: ignore[arg-type]  # what makes one is all that is needed
            ws="none",  # there are no routes for them, and a WebSocket would leave the protocol's bounds
            log_config=None,
            access_log=False,
            forwarded_allow_ips=service.settings.forwarded_allow_ips,
            timeout_keep_alive=math.ceil(service.settings.keepalive_timeout_s),
            timeout_graceful_shutdown=math.ceil(drain_s + LAST_WORDS_S),
        )
        super().__init__(config)
        self._service = service
        self._engine = service.engine
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise the signal again; the exit status of a clean end is 0
        # Threads that do something long cannot be cancelled, and Python waits for them.
        forced = threading.Timer(self._drain_s + FORCED_S, _end_by_force)
        forced.daemon = True
        forced.start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        addresses = [address_of(bound) for bound in sockets or ()]
        await super().startup(sockets)
        if addresses and not self.should_exit:
            log.info("%s", where_to_go(self._service, addresses[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain()
        ending = asyncio.create_task(self._end_later())
        try:
            await super().shutdown(sockets)  # returns when the last answer is out
        finally:
            ending.cancel()

    async def _end_later(self) -> None:
        await asyncio.sleep(self._drain_s)
        stopping = asyncio.create_task(asyncio.to_thread(self._engine.stop))
        await asyncio.sleep(LAST_WORDS_S)
        for connection in list(self.server_state.connections):  # whoever has not read his answer by now, or not asked
            connection.abort()  # type: ignore[union-attr]  # all are BoundedProtocol
        await stopping


def _allowed(connections: int) -> int:
    """As many of them as this process may have files open, beside `OTHER_FILES`. Raises its limit where it can."""
    if sys.platform == "win32":
        return connections
    wanted = connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            fit = max(1, soft - OTHER_FILES)
            log.warning("max_connections is %d, but this process may open %d files: %d it is", connections, soft, fit)
            return fit
    return connections


def _end_by_force() -> None:
    log.error("a thread has not ended in time: the process ends without it")
    logging.shutdown()
    os._exit(1)
