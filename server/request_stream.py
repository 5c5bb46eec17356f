"""The events of one request, from those who make them to the coroutine that waits for them, on one event loop."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable

from server.engine.sequence import Event, Failed, Finished, TokenEvent
from server.errors import Refused, ServerError

MOST_TOGETHER = 64  # tokens
MOST_UNREAD_BYTES = 256 * 2**20
# What a token takes that waits to be read, about: itself, each alternative to it, each column of its trace.
TOKEN_BYTES, ALTERNATIVE_BYTES, TRACE_BYTES = 600, 70, 300


class Backlog:
    """What the clients of a process have not read of their streams. Where that is more than `most` bytes, the request
    that is farthest behind is given up."""

    def __init__(self, most: int = MOST_UNREAD_BYTES) -> None:
        self._most = most
        self._streams: weakref.WeakSet[RequestStream] = weakref.WeakSet()
        self._grown = 0  # since they were last added up

    def add(self, stream: "RequestStream") -> None:
        self._streams.add(stream)

    def grow(self, size: int) -> None:
        """So many bytes more wait in one of the streams."""
        self._grown += size
        if self._grown < self._most // 8:
            return
        self._grown = 0
        by_size = sorted(self._streams, key=lambda stream: stream.unread)
        while by_size and sum(stream.unread for stream in by_size) > self._most:
            by_size.pop().give_up(Refused("What the client has not read of this stream takes too much memory.", 408))


class RequestStream:
    """An `EngineClient` calls `on_event`; a coroutine awaits `finished`, after it has read all `tokens` where texts
    stream."""

    def __init__(
        self,
        texts: int,
        *,
        on_settled: Callable[[list[Finished]], None] = lambda finished: None,
        interval: int = 1,
        backlog: Backlog | None = None,
        on_given_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`texts`: how many the request asks for. `on_settled` is called when all have ended with those that did not
        fail, whether anybody waits for them or not. `interval`: so many tokens of a text wake its reader together; the
        first one does not wait for others. `backlog`: in which its tokens count; `on_given_up` is called where it gives
        the request up."""
        self.unread = 0  # bytes, about
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tokens: asyncio.Queue[TokenEvent | None] = asyncio.Queue()  # None: the end
        self._buffer: list[TokenEvent] = []  # for which its reader is not woken yet
        self._interval = interval
        self._running = texts
        self._finished: list[Finished] = []
        self._error: ServerError | None = None
        self._on_settled = on_settled
        self._given_up = False
        self._on_given_up = on_given_up
        self._backlog = backlog or Backlog()
        self._backlog.add(self)

    def on_event(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            if self._given_up:
                return
            self._buffer.append(event)
            if event.index % self._interval == 0:
                self._flush()
            return
        if isinstance(event, Failed):
            self._error = self._error or event.error
        elif isinstance(event, Finished) and not self._given_up:
            self._finished.append(event)
        self._flush()
        self._running -= 1
        if self._running == 0:
            self._settle()

    async def finished(self) -> list[Finished]:
        """Every text's last event, in the request's order. Raises the first failure, when all texts have ended."""
        await self._settled
        if self._error is not None:
            raise self._error
        return sorted(self._finished, key=lambda event: event.sequence.index)

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
                self.unread -= sum(map(_size, tokens))
                yield tokens

    def give_up(self, error: ServerError) -> None:
        """Forgets what has not been read: its reader gets the `error`."""
        self._given_up, self._error = True, error
        self._buffer.clear()
        self._finished.clear()
        while not self._tokens.empty():
            self._tokens.get_nowait()
        self._tokens.put_nowait(None)
        self.unread = 0
        self._on_given_up()

    def _flush(self) -> None:
        size = sum(map(_size, self._buffer))
        for token in self._buffer:
            self._tokens.put_nowait(token)
        self._buffer.clear()
        self.unread += size
        self._backlog.grow(size)

    def _settle(self) -> None:
        self._tokens.put_nowait(None)
        self._on_settled(self._finished)
        if not self._settled.cancelled():  # by a client that has gone
            self._settled.set_result(None)


def _size(token: TokenEvent) -> int:
    sampled = token.token
    alternatives = len(sampled.logprob.top_token_ids) if sampled.logprob else 0
    return TOKEN_BYTES + ALTERNATIVE_BYTES * alternatives + TRACE_BYTES * len(sampled.trace)
