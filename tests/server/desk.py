"""An engine without threads, to be driven step by step: scheduler, cache and runner over a real model."""

from collections.abc import Sequence
from typing import Any

from server.engine.kv_cache import KVCache
from server.engine.runner import Runner, Step
from server.engine.scheduler import Scheduler
from server.engine.tape import Tape
from server.engine.types import Job, Row, T
from server.opening.trial import open_forward
from steering.columns import ColumnBank


class Desk:
    """Texts of at most `largest` tokens; `roots` such texts fit into the cache."""

    def __init__(
        self,
        model: Any,
        *,
        largest: int = 64,
        roots: int = 8,
        max_rows: int = 8,
        step_tokens: int = 64,
        graphs: bool = False,
        native: bool = True,
        ahead: bool = False,
    ) -> None:
        """`ahead`: each step is begun before the tokens of the one before are known, where that can be."""
        self.bank = ColumnBank(device=next(model.parameters()).device, max_tokens=step_tokens)
        forward = open_forward(model, self.bank, "tiny", native=native)
        forward.steering.install()
        self.cache = KVCache(largest, roots)
        forward.allocate(largest * roots, graphs=graphs)
        self.scheduler = Scheduler(self.cache, max_rows=max_rows, step_tokens=step_tokens)
        self.runner = Runner(forward, self.cache, step_tokens=step_tokens)
        self.ahead = ahead
        self.begun_ahead = 0
        self._begun: Step | None = None
        self.computed: list[int] = []  # tokens of each step
        self.texts: dict[Row, list[int]] = {}
        self.steered: dict[Row, int] = {}

    def step(self) -> None:
        works = self._begun.works if self._begun else self.scheduler.next()
        self.cache.check()
        if not works:
            return
        self.computed.append(sum(map(len, works)))
        step = self._begun or self.runner.launch(works)
        ahead = self.scheduler.ahead(works) if self.ahead else ()
        self._begun = self.runner.launch(ahead, step) if ahead else None
        self.begun_ahead += bool(ahead)
        for work, outcome in zip(works, step.outcomes(), strict=True):
            tape = work.tape
            self.scheduler.done(work, outcome.steered)
            if outcome.draw is None:
                continue
            assert tape.row is not None
            assert outcome.draw.finite
            tape.tokens.append(outcome.draw.token)
            if len(tape.tokens) - tape.prompt == tape.row.sampling.max_new_tokens:
                self.texts[tape.row] = tape.tokens[tape.prompt :]
                self.steered[tape.row] = sum(tape.steered)
                self.scheduler.finish(tape)

    def run(self, rows: Sequence[Row], *, arrivals: Sequence[int] = ()) -> dict[Row, list[int]]:
        """The texts of rows; row i arrives before step `arrivals[i]`, or at once."""
        step = 0
        left = sorted(zip([*arrivals] + [0] * (len(rows) - len(arrivals)), range(len(rows)), strict=True))
        while left or not self.scheduler.idle:
            while left and left[0][0] <= step:
                self.scheduler.add([Tape.of(rows[left.pop(0)[1]])])
            self.step()
            step += 1
        return {row: self.texts[row] for row in rows}

    def finish(self, job: Job[T]) -> T:
        """What a job gives that has all the space it wants."""
        while True:
            try:
                assert not next(job), "the job waits for space"
            except StopIteration as done:
                result: T = done.value
                return result
