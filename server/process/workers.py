"""What runs in the engine's process, and in a front's."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from server.app import app_of
from server.config import Settings
from server.ending import end
from server.engine.text_builder import Decoders
from server.engine_client import EngineFacts
from server.errors import StartupError
from server.front import load_tokenizer, open_judging, read_template, service_of
from server.heap import heap_frozen, heap_trimmed
from server.listener import FrontProcess, run
from server.process.client import ProcessClient
from server.process.counting import reserve_files
from server.process.host import HostedEngine, listen
from server.process.messages import decode, encode
from server.sockets import LAST_WORDS_S
from server.tokenizer import Codec
from server.tracing import open_tracing
from steering.imports import importing

log = logging.getLogger(__name__)
LOOK_S = 0.2  # how often it is looked whether the engine has failed
Configure = Callable[[Settings], None]


def run_engine(parent: Connection, settings: Settings, path: Path, configure: Configure) -> None:
    """Until the parent closes its end of the pipe, or ends. Signals are for the parent, which drains the fronts
    first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with importing():
        from server.assembly import open_engine
    configure(settings)
    with _reported(parent):
        core, _ = open_engine(settings, makes_texts=False)
        try:
            with heap_frozen(), heap_trimmed():
                host(core, path, parent)
        finally:
            core.stop()
    end(0)


def host(engine: HostedEngine, path: Path, parent: Connection) -> None:
    """Lets fronts connect at `path`, until the parent closes its end of the pipe. Where the engine fails it does not
    return: this process ends with status 1."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_host(engine, path, parent))


async def _host(engine: HostedEngine, path: Path, parent: Connection) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    listening = await listen(engine, path)
    parent.send(encode(engine.facts))
    _when_readable(parent, lambda: loop.call_soon_threadsafe(ended.set))
    while not ended.is_set():
        if engine.failure is not None:
            await _end_failed(engine, engine.failure)
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), LOOK_S)
    listening.close()  # and wait for no front that is still connected


async def _end_failed(engine: HostedEngine, failure: str) -> NoReturn:
    """Who waits for the engine is told so by its `stop`, which itself may have to wait for the device."""
    log.critical("the engine has failed, and its process ends: %s", failure)
    threading.Thread(target=engine.stop, daemon=True).start()
    await asyncio.sleep(LAST_WORDS_S)
    end(1)


def run_front(
    parent: Connection, settings: Settings, bound: socket.socket, path: Path, configure: Configure, first: bool
) -> None:
    """Until SIGTERM, which drains it, as the end of its parent does, or the end of the engine. `first`: it speaks for
    all fronts in the log."""
    configure(settings)
    with _reported(parent):
        reserve_files()
        template = read_template(settings.chat_template)
        judging = open_judging(settings)
        tokenizer = load_tokenizer(settings, alone=not settings.judge)  # the operator's code may want models
        if template is not None:
            tokenizer.chat_template = template
        facts: EngineFacts = decode(parent.recv(), EngineFacts)
        codec = Codec(tokenizer, vocab=facts.vocab, context=facts.context)
        client = ProcessClient(path, facts, Decoders.of(codec.decode, codec.decode_all))

        @asynccontextmanager
        async def engine() -> AsyncIterator[None]:
            await client.connect()
            yield
            await client.disconnect()

        tracing = open_tracing()
        app = app_of(service_of(settings, codec, client, judging, told=not first), engine, tracing)
        _when_readable(parent, _end)
        end(run(app, bound, drain_s=settings.drain_s, front=FrontProcess(lambda: parent.send(b""), first)))


def _end() -> None:
    """Drains this process, and ends it."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _reported(parent: Connection) -> Iterator[None]:
    """The parent is told why the process cannot start. A parent that is gone wants nothing any more."""
    try:
        yield
    except StartupError as error:
        with suppress(BrokenPipeError):
            parent.send(error.message)
        end(1)
    except (EOFError, BrokenPipeError):
        end(1)


def _when_readable(parent: Connection, act: Callable[[], object]) -> None:
    """The parent says nothing any more: what can be read is the end of its pipe."""

    def watch() -> None:
        wait([parent])
        act()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
