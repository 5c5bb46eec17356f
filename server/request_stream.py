"""The events of one request, from those who make them to the coroutine that waits for them, on one event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.sequence import Event, Failed, Finished, TokenEvent
from server.errors import ServerError

MOST_TOGETHER = 64  # tokens


class RequestStream:
    """An `EngineClient` calls `on_event`; a coroutine awaits `finished`, after it has read all `tokens` where texts
    stream."""

    def __init__(
        self, texts: int, *, on_settled: Callable[[list[Finished]], None] = lambda finished: None, interval: int = 1
    ) -> None:
        """`texts`: how many the request asks for. `on_settled` is called when all have ended with those that did not
        fail, whether anybody waits for them or not. `interval`: so many tokens of a text wake its reader together; the
        first one does not wait for others."""
        self._future: asyncio.Future[list[Finished]] = asyncio.get_running_loop().create_future()
        # A failure that nobody awaits, because the client has gone, is no surprise.
        self._future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._tokens: asyncio.Queue[TokenEvent | None] = asyncio.Queue()  # None: the end
        self._buffer: list[TokenEvent] = []  # for which its reader is not woken yet
        self._interval = interval
        self._running = texts
        self._finished: list[Finished] = []
        self._error: ServerError | None = None
        self._on_settled = on_settled

    def on_event(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self._buffer.append(event)
            if event.index % self._interval == 0:
                self._flush()
            return
        if isinstance(event, Failed):
            self._error = self._error or event.error
        elif isinstance(event, Finished):
            self._finished.append(event)
        self._flush()
        self._running -= 1
        if self._running == 0:
            self._settle()

    async def finished(self) -> list[Finished]:
        """Every text's last event, in the request's order. Raises the first failure, when all texts have ended."""
        return await self._future

    async def tokens(self) -> AsyncIterator[list[TokenEvent]]:
        """The tokens that have come since the last item, at least one and at most `MOST_TOGETHER`, so that what becomes
        of them is small; ends when all texts have ended."""
        ended = False
        while not ended:
            if not self._tokens.empty():  # the client is behind: `get` would return at once, and others have to go on
                await asyncio.sleep(0)
            arrived = [await self._tokens.get()]
            while len(arrived) < MOST_TOGETHER and not self._tokens.empty():
                arrived.append(self._tokens.get_nowait())
            ended = arrived[-1] is None
            if tokens := [token for token in arrived if token is not None]:
                yield tokens

    def _flush(self) -> None:
        for token in self._buffer:
            self._tokens.put_nowait(token)
        self._buffer.clear()

    def _settle(self) -> None:
        self._tokens.put_nowait(None)
        self._on_settled(self._finished)
        if self._future.cancelled():  # the client has gone
            return
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(sorted(self._finished, key=lambda event: event.sequence.index))
