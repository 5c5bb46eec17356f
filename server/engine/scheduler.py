"""Which tokens the next forward pass computes. Touches no tensor.

Continuous batching: in every step each row that generates gets its one token, and what is left of the step's budget
goes to prompts, first come first served, in chunks. Rows join and leave at any step.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from server.engine.kv_cache import KVCache
from server.engine.tape import Tape, Work

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
        budget = self._step_tokens - len(works)
        for tape in self._running:
            if tape.pending > 1 and budget:
                works.append(self._chunk(tape, budget))
                budget -= len(works[-1])
        if self.preemptions == preempted and not self.hold:
            self._admit(works, budget)
        return tuple(sorted(works, key=_place))

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
                works.append(self._chunk(tape, 1))
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

    def _admit(self, works: list[Work], budget: int) -> None:
        for tape in list(self._waiting):
            if not budget or len(self._running) >= self._max_rows:
                return
            if self._better_later(tape):
                continue
            if not self._open(tape):
                return
            self._waiting.remove(tape)
            self._running.append(tape)
            works.append(self._chunk(tape, budget))
            budget -= len(works[-1])

    def _better_later(self, tape: Tape) -> bool:
        """Whether rows that run are about to compute what this one would have to compute as well."""
        coming = self._cache.coming(tape, self._running)
        if coming <= WORTH_WAITING * len(tape.tokens):
            return False
        known = self._cache.shareable(tape)
        return coming - known > WORTH_WAITING * (len(tape.tokens) - known)

    def _open(self, tape: Tape) -> bool:
        """Space for the answer, too, or at least for what there is."""
        assert tape.row is not None, "only rows are scheduled"
        length = len(tape.tokens)
        wanted = min(tape.row.sampling.max_new_tokens - (length - tape.prompt), RESERVED)
        rooms = (max(length + wanted, self._roomy), length + wanted, length)
        return any(self._cache.open(tape, room) for room in dict.fromkeys(rooms))

    @staticmethod
    def _chunk(tape: Tape, budget: int) -> Work:
        return Work(tape, tape.cached, tape.cached + min(tape.pending, budget))


def _of(tape: Tape, request: str) -> bool:
    return tape.row is not None and tape.row.request == request


def _place(work: Work) -> tuple[bool, int, int]:
    """Single tokens first, by size and place of their extents, so that neighbours can be attended to at once."""
    extent = work.tape.extent
    assert extent is not None, "work is done on open tapes"
    return len(work) > 1, extent.size, extent.start
