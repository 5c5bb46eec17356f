"""uvicorn with a socket that is bound before the model is loaded, and a shutdown that drains."""

import asyncio
import errno
import gc
import logging
import socket
from ipaddress import ip_address
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.config import Settings
from server.errors import StartupError
from server.service import Service
from server.web import home

log = logging.getLogger(__name__)
BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it


def listen(settings: Settings) -> socket.socket:
    """A bound socket; it takes connections once the server runs. Raises StartupError."""
    where = f"{settings.host} port {settings.port}"
    try:
        bound = _bind(settings.host, settings.port)
    except (OSError, UnicodeError) as error:  # the second for a host that no name may be
        raise _cannot_listen(where, error) from error
    if settings.api_key is None and not ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
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
    command = home.curl(address, active.defaults if active else {}, asks_for_key=service.settings.api_key is not None)
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
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False))
        service: Service = app.state.service
        self._service = service
        self._engine = service.engine
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise the signal again; the exit status of a clean end is 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        addresses = [address_of(bound) for bound in sockets or ()]
        await super().startup(sockets)
        if addresses and not self.should_exit:
            log.info("%s", where_to_go(self._service, addresses[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain()
        stopping = asyncio.create_task(self._stop_later())
        try:
            await super().shutdown(sockets)  # returns when the last answer is out
        finally:
            stopping.cancel()

    async def _stop_later(self) -> None:
        await asyncio.sleep(self._drain_s)
        await asyncio.to_thread(self._engine.stop)
