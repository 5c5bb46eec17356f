"""What has become of each row, and telling those who wait for it."""

import logging
from collections.abc import Callable, Sequence

from server.engine.progress import Progress
from server.engine.scheduler import Scheduler
from server.engine.tape import Tape, Work
from server.engine.types import Draw, Event, Failed, Finished, FinishReason, Row, Sink
from server.errors import GenerationFailed, NotFinite, ServerError

log = logging.getLogger(__name__)


class Delivery:
    """Rows from their submission to their last event."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        eos: frozenset[int],
        decode: Callable[..., str],
        on_unqueued: Callable[[int], None],
    ) -> None:
        """`on_unqueued` is told of rows that wait no longer, be it that they run or that they have ended."""
        self._scheduler = scheduler
        self._eos = eos
        self._decode = decode
        self._on_unqueued = on_unqueued
        self._progress: dict[Row, Progress] = {}
        self._untold: list[tuple[Tape, Draw, FinishReason | None]] = []

    def __len__(self) -> int:
        """How many rows still owe their last event."""
        return len(self._progress)

    def begin(self, rows: Sequence[Row], sink: Sink, at: float) -> None:
        """Rows that were submitted `at` a moment (of time.monotonic) wait; those that want no token have ended."""
        self._progress |= {row: Progress(row, sink, at, self._eos, self._decode) for row in rows}
        self._scheduler.add(Tape.of(row) for row in rows if row.sampling.max_new_tokens)
        for row in rows:
            if not row.sampling.max_new_tokens:
                self._on_unqueued(1)
                self._end(self._progress[row].finish("length", 0))

    def admit(self, works: Sequence[Work]) -> int:
        """Notes which rows have their first step now; returns how many."""
        rows = [self._progress[work.tape.row] for work in works if work.tape.row]
        new = [progress for progress in rows if not progress.admitted]
        for progress in new:
            progress.admit()
        self._on_unqueued(len(new))
        return len(new)

    def deliver(self, tape: Tape, draw: Draw) -> None:
        """One draw to its row, which is told of it by `tell`; a row that cannot go on fails its request only."""
        row = tape.row
        assert row is not None, "only rows draw"
        if not draw.finite:
            log.error("the logits of a row of request %s are not finite", row.request)
            broken = NotFinite("The model's output is not finite: there is no next token.")
            self.give_up(row.request, broken, keep=False)
            return
        tape.tokens.append(draw.token)
        try:
            reason = self._progress[row].accept(draw)
        except Exception:
            self._cannot_decode(row)
            return
        self._untold.append((tape, draw, reason))
        if reason:
            self._scheduler.finish(tape)

    def tell(self) -> None:
        """Tells the rows what has been delivered since this was last called: the text of it, and who has ended."""
        untold, self._untold = self._untold, []
        for tape, draw, reason in untold:
            row = tape.row
            progress = self._progress.get(row) if row else None
            if row is None or progress is None:
                continue  # its request has failed with a row before it
            try:
                event = progress.finish(reason, sum(tape.steered)) if reason else None
                piece = progress.piece(draw, last=event is not None) if row.stream else None
            except Exception:
                self._cannot_decode(row)
                continue
            if piece is not None:
                self._tell(progress, piece)
            if event is not None:
                self._end(event)

    def cancel(self, request: str) -> None:
        """End every row of a request with what it has."""
        self.tell()
        for tape, progress in self._drop(request):
            self._end(progress.finish("cancelled", sum(tape.steered)))

    def give_up(self, request: str, error: ServerError, *, keep: bool = True) -> None:
        """Fail every row of a request: its client gets no answer, whatever the others would have become. `keep`: what
        they computed is sound."""
        self.tell()
        for _, progress in self._drop(request, keep=keep):
            self._end(Failed(progress.row, error))

    def clear(self, error: ServerError) -> None:
        """Fail every row that there is."""
        self.tell()
        self._scheduler.clear()
        for row in list(self._progress):
            self._end(Failed(row, error))

    def _drop(self, request: str, *, keep: bool = True) -> list[tuple[Tape, Progress]]:
        """Takes a request's rows out, wherever they are; each still owes its last event."""
        dropped = [(tape, self._progress[tape.row]) for tape in self._scheduler.drop(request, keep=keep) if tape.row]
        self._on_unqueued(sum(not progress.admitted for _, progress in dropped))
        return dropped

    def _cannot_decode(self, row: Row) -> None:
        log.exception("the text of a row of request %s cannot be decoded", row.request)
        failure = GenerationFailed("The generated tokens could not be turned into text.")
        self.give_up(row.request, failure)
        if row in self._progress:  # it was not in the scheduler any more
            self._end(Failed(row, failure))

    def _end(self, event: Finished | Failed) -> None:
        self._tell(self._progress.pop(event.row), event)

    @staticmethod
    def _tell(progress: Progress, event: Event) -> None:
        try:
            progress.sink(event)
        except Exception:  # a sink whose event loop has closed must not take the engine down
            log.exception("nobody took an event of request %s", event.row.request)
