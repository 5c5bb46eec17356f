"""Which rows run next. Touches no tensor.

Static batches: a batch is gathered from the rows that wait, and runs until its last row ends; rows
that end earlier leave it. Groups (the arms of one comparison) are never split over two batches.
"""

from collections import deque
from collections.abc import Sequence
from itertools import groupby

from server.engine.types import Batch, Row


class Scheduler:
    """Rows that wait and rows that run, first come first served."""

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._waiting: deque[tuple[Row, ...]] = deque()  # one entry a group
        self._running: list[Row] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(map(len, self._waiting))

    @property
    def full(self) -> bool:
        """Whether the next batch could take no more rows."""
        return self.waiting >= self._max_rows

    def add(self, rows: Sequence[Row]) -> None:
        """Queue the rows of one request; neighbours of one group stay together."""
        for _, group in groupby(rows, key=lambda row: row.group):
            self._waiting.append(tuple(group))

    def next(self) -> Batch | None:
        """The rows of the next step, or None when there is nothing to do."""
        if self._running:
            return Batch(tuple(self._running), fresh=False)
        self._running = self._gather()
        return Batch(tuple(self._running), fresh=True) if self._running else None

    def finish(self, row: Row) -> None:
        """The row has ended: it is in no later step."""
        self._running = [other for other in self._running if other is not row]

    def drop(self, request: str) -> list[Row]:
        """Take every row of a request out; returns those that were there."""
        groups = [group for group in self._waiting if group[0].request == request]
        running = [row for row in self._running if row.request == request]
        self._waiting = deque(group for group in self._waiting if group[0].request != request)
        self._running = [row for row in self._running if row.request != request]
        return running + [row for group in groups for row in group]

    def clear(self) -> list[Row]:
        """Take everything out; returns it."""
        rows = self._running + [row for group in self._waiting for row in group]
        self._waiting.clear()
        self._running = []
        return rows

    def _gather(self) -> list[Row]:
        rows: list[Row] = []
        prompt = answer = 0  # the longest ones
        while self._waiting:
            group = self._waiting[0]
            prompt = max(prompt, *(len(row.tokens) for row in group))
            answer = max(answer, *(row.sampling.max_new_tokens for row in group))
            count = len(rows) + len(group)
            # A first group is always taken, however large: otherwise it would wait for ever.
            if rows and (count > self._max_rows or count * (prompt + answer) > self._max_tokens):
                break
            rows.extend(self._waiting.popleft())
        return rows
