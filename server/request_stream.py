"""From the engine's thread to the event loop: the events of one request."""

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.sequence import Event, Failed, Finished, TokenEvent
from server.errors import ServerError

MOST_TOGETHER = 64  # tokens


class RequestStream:
    """The engine calls `on_event`; a coroutine awaits `finished`, after it has read all `tokens` where texts stream."""

    def __init__(
        self,
        texts: int,
        on_end: Callable[[], None],
        *,
        on_settled: Callable[[list[Finished]], None] = lambda finished: None,
        interval: int = 1,
    ) -> None:
        """`texts`: how many the request asks for. `on_end` is called once, on the engine's thread, when all have ended;
        after it, on the event loop, `on_settled` with those that did not fail, whether anybody waits for them or not.
        `interval`: so many tokens of a text wake the event loop together; the first one does not wait for others."""
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[list[Finished]] = self._loop.create_future()
        # A failure that nobody awaits, because the client has gone, is no surprise.
        self._future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._tokens: asyncio.Queue[TokenEvent | None] = asyncio.Queue()  # None: the end
        self._buffer: list[TokenEvent] = []  # used by the engine's thread alone
        self._interval = interval
        self._running = texts
        self._finished: list[Finished] = []
        self._error: ServerError | None = None
        self._on_end = on_end
        self._on_settled = on_settled

    def on_event(self, event: Event) -> None:
        """Called on the engine's thread; returns at once."""
        if isinstance(event, TokenEvent):
            self._buffer.append(event)
            if event.index % self._interval == 0:
                self._flush()
            return
        if isinstance(event, Failed):
            self._error = self._error or event.error
        elif isinstance(event, Finished):
            self._finished.append(event)
        self._running -= 1
        if self._running == 0:
            self._on_end()
        self._flush()
        if self._running == 0:
            self._loop.call_soon_threadsafe(self._settle)

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
        buffered, self._buffer = self._buffer, []
        if buffered:
            self._loop.call_soon_threadsafe(self._put, buffered)

    def _put(self, tokens: list[TokenEvent]) -> None:
        for token in tokens:
            self._tokens.put_nowait(token)

    def _settle(self) -> None:
        self._tokens.put_nowait(None)
        self._on_settled(self._finished)
        if self._future.cancelled():  # the client has gone
            return
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(sorted(self._finished, key=lambda event: event.sequence.index))
