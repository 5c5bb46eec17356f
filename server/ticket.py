"""Brings the engine's events of one request back to the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.sequence import Event, Failed, Finished, TokenEvent
from server.errors import ServerError


class Ticket:
    """The sink of one request. Await `finished`, after all `pieces` where rows stream; `on_end` runs once, when the
    engine holds none of its rows."""

    def __init__(self, rows: int, on_end: Callable[[], None], *, interval: int = 1) -> None:
        """`interval`: a row's tokens wake the event loop this many at a time; the first one comes at once."""
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[list[Finished]] = self._loop.create_future()
        # A failure that nobody awaits, because the client has gone, is no surprise.
        self._future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._pieces: asyncio.Queue[TokenEvent | None] = asyncio.Queue()  # None: no more will come
        self._held: list[TokenEvent] = []  # on the engine's thread
        self._interval = interval
        self._left = rows
        self._finished: list[Finished] = []
        self._error: ServerError | None = None
        self._on_end = on_end

    def __call__(self, event: Event) -> None:
        """On the engine's thread."""
        if isinstance(event, TokenEvent):
            self._held.append(event)
            if event.index % self._interval == 0:
                self._flush()
            return
        if isinstance(event, Failed):
            self._error = self._error or event.error
        else:
            self._finished.append(event)
        self._left -= 1
        if self._left == 0:
            self._on_end()
        self._flush()
        if self._left == 0:
            self._loop.call_soon_threadsafe(self._settle)

    async def finished(self) -> list[Finished]:
        """Every row's last event, in the order of the rows. Raises the first failure."""
        return await self._future

    async def pieces(self) -> AsyncIterator[list[TokenEvent]]:
        """The tokens of the rows that stream: all that have come since the last ones were taken, at least one; ends
        when all rows have."""
        ended = False
        while not ended:
            come = [await self._pieces.get()]
            while not self._pieces.empty():
                come.append(self._pieces.get_nowait())
            ended = come[-1] is None
            if pieces := [piece for piece in come if piece is not None]:
                yield pieces

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held:
            self._loop.call_soon_threadsafe(self._put, held)

    def _put(self, pieces: list[TokenEvent]) -> None:
        for piece in pieces:
            self._pieces.put_nowait(piece)

    def _settle(self) -> None:
        self._pieces.put_nowait(None)
        if self._future.cancelled():  # the client has gone
            return
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(sorted(self._finished, key=lambda event: event.row.index))
