"""uvicorn with a socket that is bound before the model is loaded, and a shutdown that drains."""

import asyncio
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

log = logging.getLogger(__name__)


def listen(settings: Settings) -> socket.socket:
    """A bound socket; it takes connections once the server runs. Raises StartupError."""
    where = f"{settings.host} port {settings.port}"
    try:
        bound = _bind(settings.host, settings.port)
    except (OSError, UnicodeError) as error:  # the second for a host that no name may be
        why = error.strerror if isinstance(error, OSError) else error
        raise StartupError(f"The server cannot listen on {where}: {why}.") from error
    if settings.api_key is None and not ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
        log.warning(
            "%s can be reached from other machines, and the server asks nobody for a key: set MATSTEER_API_KEY", where
        )
    return bound


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
    gc.collect()
    gc.freeze()
    DrainingServer(app, drain_s=drain_s).run(sockets=[bound])


class DrainingServer(uvicorn.Server):
    """At shutdown takes no new requests; running ones have `drain_s` seconds to finish, then they end with a 503."""

    def __init__(self, app: FastAPI, *, drain_s: float) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False))
        service: Service = app.state.service
        self._engine = service.engine
        self._drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise the signal again; the exit status of a clean end is 0

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
