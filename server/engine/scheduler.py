"""Which tokens the next forward pass computes. Touches no tensor.

Continuous batching: in every step each row that generates gets its one token, and what is left of the step's budget
goes to prompts, first come first served. The first one that does not fit is read in chunks, of half of what is left at
least; behind it, prompts that fit into the rest need not wait for it. Rows join and leave at any step.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from server.engine.kv_cache import KVCache
from server.engine.tape import Tape, Work
from server.engine.types import Row

# Tokens of its answer for which a row gets space at once; a longer answer moves to larger extents.
RESERVED = 256
# A row waits for a neighbour that is computing the same beginning if that saves this share of its own work.
WORTH_WAITING = 0.5


class Scheduler:
    """Rows that wait and rows that run. The one that came first always goes on: when the cache is full, the youngest
    gives its space back and is computed again later, so that nothing can wait for itself."""

    def __init__(self, cache: KVCache, *, max_rows: int, step_tokens: int) -> None:
        """`step_tokens`: how many tokens one forward pass may have."""
        if step_tokens < max_rows:
            raise ValueError(f"a step of {step_tokens} tokens cannot hold one for each of {max_rows} rows")
        self.preemptions = 0
        self.hold = False  # admit nobody: somebody waits for space that running rows will free
        self._cache = cache
        self._max_rows = max_rows
        # Rows with extents of one size lie side by side; half of the memory is enough for this.
        self._roomy = min(cache.extents.largest, cache.extents.total // (2 * max_rows))
        self._step_tokens = step_tokens
        self._waiting: deque[Tape] = deque()
        self._running: list[Tape] = []  # in the order of admission

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def running(self) -> Sequence[Tape]:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, tapes: Iterable[Tape]) -> None:
        self._waiting.extend(tapes)

    def next(self) -> tuple[Work, ...]:
        """The work of the next step, rows that lie side by side in the cache next to each other; nothing when there is
        nothing to do. Its caller reports `done`, and puts what was drawn on the tapes."""
        preempted = self.preemptions
        works = self._decode()
        reading = _Reading(self._step_tokens - len(works))
        for tape in self._running:
            if tape.pending > 1:
                reading.take(tape)
        if self.preemptions == preempted and not self.hold:
            self._admit(reading)
        return tuple(sorted(works + reading.works, key=_place))

    def ahead(self, works: Sequence[Work]) -> tuple[Work, ...]:
        """The step after these works, begun before what they draw is known: one token for each row that goes on as far
        as can be foreseen, which is what `next` would say. Nothing where it would say something else, or where a row
        has to know its tokens, or to be told more than them, before the next one is drawn."""
        if len(works) < len(self._running) or not all(work.draws for work in works):
            return ()
        following = []
        for work in works:
            tape = work.tape
            row = _row(tape)
            if tape.extent is None or work.stop + 1 - tape.prompt >= row.sampling.max_new_tokens:
                continue  # has ended, or ends with the token that is being drawn
            if tape.extent.size <= work.stop or not _can_hurry(row):
                return ()
            following.append(Work(tape, work.stop, work.stop + 1))
        if self._waiting and len(following) < self._max_rows:
            return ()
        return tuple(sorted(following, key=_place))

    @staticmethod
    def done(work: Work, steered: list[int]) -> None:
        """The work has been done; its tokens were steered so often each."""
        work.tape.cached = work.stop
        work.tape.steered += steered

    def finish(self, tape: Tape) -> None:
        """The row has ended: it is in no later step."""
        self._running.remove(tape)
        self._cache.close(tape)

    def drop(self, request: str, *, keep: bool = True) -> list[Tape]:
        """Takes every row of a request out; returns those that were there. `keep`: what they computed is sound."""
        running = [tape for tape in self._running if _of(tape, request)]
        waiting = [tape for tape in self._waiting if _of(tape, request)]
        for tape in running:
            self._running.remove(tape)
            self._cache.close(tape, keep=keep)
        self._waiting = deque(tape for tape in self._waiting if not _of(tape, request))
        return running + waiting

    def clear(self) -> list[Tape]:
        """Takes everything out; returns it."""
        tapes = [*self._running, *self._waiting]
        for tape in self._running:
            self._cache.close(tape, keep=False)
        self._running = []
        self._waiting.clear()
        return tapes

    def _decode(self) -> list[Work]:
        """One token for every row that has just one to compute."""
        works = []
        for tape in list(self._running):
            if tape.extent is not None and tape.pending == 1 and self._has_room(tape):
                works.append(_part(tape, 1))
        return works

    def _has_room(self, tape: Tape) -> bool:
        """Finds space for the tape's tokens, at the cost of those that came later or, at last, of itself."""
        while not self._cache.grow(tape, len(tape.tokens)):
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is tape:
                return False
        return True

    def _preempt(self, tape: Tape) -> None:
        self._running.remove(tape)
        self._cache.close(tape)
        self._waiting.appendleft(tape)
        self.preemptions += 1

    def _admit(self, reading: "_Reading") -> None:
        for tape in list(self._waiting):
            if not reading.budget or len(self._running) >= self._max_rows:
                return
            if reading.long and not self._fits(tape, reading.budget):
                continue
            if self._better_later(tape):
                continue
            if not self._open(tape):
                return
            self._waiting.remove(tape)
            self._running.append(tape)
            reading.take(tape)

    def _fits(self, tape: Tape, budget: int) -> bool:
        length = len(tape.tokens)
        return length <= budget or length - self._cache.shareable(tape) <= budget

    def _better_later(self, tape: Tape) -> bool:
        """Whether rows that run are about to compute what this one would have to compute as well."""
        coming = self._cache.coming(tape, self._running)
        if coming <= WORTH_WAITING * len(tape.tokens):
            return False
        known = self._cache.shareable(tape)
        return coming - known > WORTH_WAITING * (len(tape.tokens) - known)

    def _open(self, tape: Tape) -> bool:
        """Space for the answer, too, or at least for what there is."""
        length = len(tape.tokens)
        wanted = min(_row(tape).sampling.max_new_tokens - (length - tape.prompt), RESERVED)
        rooms = (max(length + wanted, self._roomy), length + wanted, length)
        return any(self._cache.open(tape, room) for room in dict.fromkeys(rooms))


class _Reading:
    """How a step's budget of tokens is spent on prompts."""

    def __init__(self, budget: int) -> None:
        self.budget = budget  # for prompts that fit
        self.long: Tape | None = None  # the first prompt that does not
        self._kept = 0  # tokens of the budget that it has for sure
        self._whole: list[Work] = []

    @property
    def works(self) -> list[Work]:
        chunk = _part(self.long, self._kept + self.budget) if self.long else None
        return [*self._whole, chunk] if chunk else self._whole

    def take(self, tape: Tape) -> None:
        """Of the prompts in the order in which they came."""
        if tape.pending <= self.budget:
            self._whole.append(_part(tape, tape.pending))
            self.budget -= tape.pending
        elif self.long is None and self.budget:
            self.long, self._kept = tape, (self.budget + 1) // 2
            self.budget -= self._kept


def _row(tape: Tape) -> Row:
    assert tape.row is not None, "only rows are scheduled"
    return tape.row


def _can_hurry(row: Row) -> bool:
    return row.sampling.repetition_penalty == 1 and row.sampling.logprobs is None and not row.trace


def _part(tape: Tape, most: int) -> Work:
    return Work(tape, tape.cached, tape.cached + min(tape.pending, most))


def _of(tape: Tape, request: str) -> bool:
    return tape.row is not None and tape.row.request == request


def _place(work: Work) -> tuple[bool, int, int]:
    """Single tokens first, by size and place of their extents, so that neighbours can be attended to at once."""
    extent = work.tape.extent
    assert extent is not None, "work is done on open tapes"
    return len(work) > 1, extent.size, extent.start
