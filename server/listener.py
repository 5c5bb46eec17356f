"""uvicorn with a socket that is bound before the model is loaded (`server/sockets.py`), and a shutdown that drains."""

import asyncio
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn
from fastapi import FastAPI

from server.ending import end
from server.errors import StartupError
from server.heap import heap_frozen, heap_trimmed
from server.protocol import BoundedProtocol, Connections
from server.sockets import FORCED_S, LAST_WORDS_S, address_of, claim
from server.web import home

if TYPE_CHECKING:  # who only listens needs no PyTorch
    from server.service import Service

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)
OTHER_FILES = 128  # that the process has open beside its connections


async def where_to_go(service: "Service", address: str) -> str:
    """What a user can open and send, once the server runs."""
    active = (await service.snapshot()).active
    command = home.curl(address, active.defaults if active else {}, asks_for_key=service.settings.asks_for_key)
    return (
        f"ready at {address}\n"
        f"  page    {address}/\n"
        f"  API     {address}/docs, for OpenAI's clients {address}/v1\n"
        f"  try     {command}"
    )


def run(app: FastAPI, bound: socket.socket, *, drain_s: float, front: "FrontProcess | None" = None) -> int:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once. Returns the exit status: 1 where
    the engine has failed. `front`: where this process is one of several."""
    try:
        claim(bound)
    except StartupError:
        service: Service = app.state.service
        service.client.stop()
        raise
    with heap_frozen(), heap_trimmed():
        server = DrainingServer(app, drain_s=drain_s, front=front)
        server.run(sockets=[bound])
    return int(server.failed)


@dataclass(frozen=True)
class FrontProcess:
    """A server without an engine, which another process supervises."""

    on_start: Callable[[], None]
    first: bool  # the one that says where to go


class DrainingServer(uvicorn.Server):
    """At shutdown takes no new requests; running ones have `drain_s` seconds to finish, then they end with a 503."""

    def __init__(self, app: FastAPI, *, drain_s: float, front: FrontProcess | None = None) -> None:
        service: Service = app.state.service
        allowed = _allowed(service.settings.max_connections)
        connections = Connections(service.settings, allowed, service.metrics.refusal)
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
        self._engine = service.client
        self._drain_s = drain_s
        self._front = front
        self.failed = False  # the engine has, and ends what is served

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._front and sig == signal.SIGINT:  # a terminal sends it to all processes: the supervisor sees to it
            return
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise the signal again; the exit status of a clean end is 0
        self._force_end()

    def _force_end(self) -> None:
        """Threads that do something long cannot be cancelled, and Python waits for them."""
        forced = threading.Timer(self._drain_s + FORCED_S, _end_by_force)
        forced.daemon = True
        forced.start()

    async def on_tick(self, counter: int) -> bool:
        if not self.failed and (failure := self._engine.failure) is not None:
            log.critical("the engine has failed, and the server ends: %s", failure)
            self.failed = self.should_exit = True
            self._drain_s = 0.0
            self._force_end()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        addresses = [address_of(bound) for bound in sockets or ()]
        await super().startup(sockets)
        if not addresses or self.should_exit:
            return
        if self._front:
            self._front.on_start()
        if not self._front or self._front.first:
            log.info("%s", await where_to_go(self._service, addresses[0]))

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


def _end_by_force() -> NoReturn:
    log.error("a thread has not ended in time: the process ends without it")
    end(1)
