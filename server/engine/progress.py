"""What one running row has produced so far, and when it ends."""

import time
from collections.abc import Callable, Sequence

from server.detokenizer import Detokenizer
from server.engine.types import Draw, Finished, FinishReason, Piece, Row, Sink, Timing


class Progress:
    """Collects a row's draws until the end-of-text token, a stop string, the length or a cancellation."""

    def __init__(self, row: Row, sink: Sink, submitted: float, eos: frozenset[int], decode: Callable[..., str]) -> None:
        self.row = row
        self.sink = sink
        self._submitted = submitted
        self._admitted: float | None = None
        self._first: float | None = None
        self._ends = (frozenset() if row.sampling.ignore_eos else eos) | set(row.sampling.stop_ids)
        self._detokenizer = Detokenizer(decode, row.tokens)
        self._tokens: list[int] = []
        self._draws: list[Draw] = []
        self._text = ""
        self._given = 0  # characters of it that pieces have given out

    @property
    def admitted(self) -> bool:
        """Whether the row has left the queue."""
        return self._admitted is not None

    def admit(self) -> None:
        """The row's first step is about to run; later ones change nothing."""
        if self._admitted is None:
            self._admitted = time.monotonic()

    def accept(self, draw: Draw) -> FinishReason | None:
        """Take one step's draw; returns why the row ends, or None while it goes on."""
        self._first = time.monotonic() if self._first is None else self._first
        self._tokens.append(draw.token)
        if self.row.sampling.logprobs is not None or self.row.trace:
            self._draws.append(draw)
        if draw.token in self._ends:
            return "stop"
        self._detokenizer.push(draw.token)
        if self.row.sampling.stop and self._read():
            return "stop"
        return "length" if len(self._tokens) >= self.row.sampling.max_new_tokens else None

    def finish(self, reason: FinishReason, steered: int) -> Finished:
        """The row's last event. `steered`: how many of its tokens were."""
        if self._read(final=True) and reason == "length":
            reason = "stop"
        return Finished(
            row=self.row,
            tokens=tuple(self._tokens),
            text=self._text,
            reason=reason,
            steered_tokens=steered,
            timing=self._timing(),
            draws=tuple(self._draws),
        )

    def piece(self, draw: Draw, *, last: bool) -> Piece:
        """What the draw that was accepted adds to the text that is certain."""
        if not self.row.sampling.stop and not last:
            self._read()
        certain = len(self._text) - (0 if last else _begun(self.row.sampling.stop, self._text))
        text, self._given = self._text[self._given : certain], max(self._given, certain)
        return Piece(self.row, len(self._tokens) - 1, draw, text)

    def _read(self, *, final: bool = False) -> bool:
        """Decode what is new; cut the text before the first stop string, and say whether there is one."""
        piece = self._detokenizer.read(final=final)
        stops = self.row.sampling.stop
        if not stops:
            self._text += piece
            return False
        # A stop string may have begun in earlier pieces.
        start = max(0, len(self._text) - max(map(len, stops)) + 1)
        self._text += piece
        cut = _first_of(stops, self._text, start)
        if cut is not None:
            self._text = self._text[:cut]
        return cut is not None

    def _timing(self) -> Timing:
        now = time.monotonic()

        def since(moment: float | None) -> float:
            return round(((now if moment is None else moment) - self._submitted) * 1000, 3)

        return Timing(queue_ms=since(self._admitted), ttft_ms=since(self._first), total_ms=since(now))


def _first_of(needles: Sequence[str], text: str, start: int) -> int | None:
    """Where the earliest of the needles begins, at or after `start`."""
    places = [place for needle in needles if (place := text.find(needle, start)) >= 0]
    return min(places, default=None)


def _begun(needles: Sequence[str], text: str) -> int:
    """How many characters at the end of the text may be the beginning of a needle."""
    longest = max(map(len, needles), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(needle.startswith(text[-length:]) for needle in needles):
            return length
    return 0
