"""The engine's end: fronts connect, call its methods, and get the events of their requests, a message a step."""

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from server.engine.sequence import Event, Failed, Finished, TokenEvent
from server.engine_client import EngineClient, EngineRequest
from server.errors import ServerError
from server.process.messages import (
    CALLS,
    Call,
    Cancel,
    CancelCall,
    Close,
    DetailedToken,
    Ended,
    Error,
    Events,
    FromFront,
    Message,
    Reply,
    StopSequence,
    decode,
    encode,
    frame,
    read_frame,
    types_of,
)

log = logging.getLogger(__name__)


class HostedEngine(EngineClient, Protocol):
    """An engine that makes no texts: those who take its events do, and tell it where a stop string is complete."""

    def stop_sequence(self, request_id: str, index: int) -> None:
        """End one sequence of a request with the tokens that it has."""
        ...


async def listen(engine: HostedEngine, path: Path) -> asyncio.Server:
    """Fronts may connect from now on."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # this process ends
            await _Front(engine, writer).serve(reader)

    return await asyncio.start_unix_server(connected, path)


class _Front:
    """A front that is connected. When it goes, by itself or killed, all that it has asked for ends."""

    def __init__(self, engine: HostedEngine, writer: asyncio.StreamWriter) -> None:
        self._engine = engine
        self._writer = writer
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._requests: set[str] = set()  # that have been submitted and not closed
        self._unsent: list[tuple[int, Event]] = []

    async def serve(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._take(decode(await read_frame(reader), FromFront))
        except (OSError, asyncio.IncompleteReadError):
            if self._requests:
                log.warning("a front has gone: %d requests of it end", len(self._requests))
        finally:
            for call in self._calls.values():
                call.cancel()
            for request_id in self._requests:
                self._engine.cancel(request_id)
                self._engine.close(request_id)
            self._writer.close()

    def _take(self, message: FromFront) -> None:
        match message:
            case Call(id=id, method=method, arguments=arguments):
                self._calls[id] = call = asyncio.create_task(self._answer(id, method, arguments))
                call.add_done_callback(lambda _: self._calls.pop(id))
            case CancelCall(id=id):
                if id in self._calls:
                    self._calls[id].cancel()
            case StopSequence(request_id=request_id, index=index):
                self._engine.stop_sequence(request_id, index)
            case Cancel(request_id=request_id):
                self._engine.cancel(request_id)
            case Close(request_id=request_id):
                self._requests.discard(request_id)
                self._engine.close(request_id)

    async def _answer(self, id: int, method: str, arguments: bytes) -> None:
        try:
            if method == "submit":
                result = await self._submit(id, *decode(arguments, tuple[EngineRequest]))
            else:
                given = decode(arguments, types_of(CALLS[method])[0])
                result = encode(await getattr(self._engine, method)(*given))
        except ServerError as error:
            self._send(Reply(id, error=Error.of(error)))
        except Exception:
            log.exception("the call of %s failed", method)
            self._send(Reply(id, error=Error.of(ServerError("The server failed on this request."))))
        else:
            self._send(Reply(id, result))

    async def _submit(self, id: int, request: EngineRequest) -> bytes:
        submitted = await self._engine.submit(request, lambda event: self._told(id, event))
        self._requests.add(request.id)
        return encode(submitted.arms)

    def _told(self, request: int, event: Event) -> None:
        """The events of a step come one after the other, and leave together."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append((request, event))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        tokens: list[int] = []
        detailed: list[DetailedToken] = []
        ended: list[Ended] = []
        for request, event in unsent:
            if not isinstance(event, TokenEvent):
                ended.append(_ended(request, event))
            elif event.progress is None and event.token.logprob is None and not event.token.trace:
                tokens += (request, event.sequence.index, event.token.token_id)
            else:
                detailed.append(DetailedToken(request, event.sequence.index, event.token, event.progress))
        self._send(Events(tokens, detailed, ended))

    def _send(self, message: Message) -> None:
        """Never waits: a front that does not read holds up nobody but itself."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))


def _ended(request: int, event: Event) -> Ended:
    if isinstance(event, Failed):
        return Ended(request, event.sequence.index, Error.of(event.error))
    assert isinstance(event, Finished), "what is scored is a call"
    unsent = not event.sequence.stream
    return Ended(
        request,
        event.sequence.index,
        finish_reason=event.finish_reason,
        steered_tokens=event.steered_tokens,
        timing=event.timing,
        token_ids=event.token_ids if unsent and not event.tokens else (),
        tokens=event.tokens if unsent else (),
    )
