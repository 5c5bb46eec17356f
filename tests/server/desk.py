"""An engine without a thread, to be driven step by step: the real one, over a real model."""

from concurrent.futures import Future
from itertools import count
from typing import Any, TypeVar

import torch

from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Event, Failed, Finished, ScheduledChunk, Sequence
from server.loading import open_runner
from steering.bank import ColumnBank

T = TypeVar("T")
NAMES = count()


class Desk:
    """A cache of `num_blocks` blocks. Requests that fail raise their error."""

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int = 64,
        block_size: int = 8,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_num_logits: int = 2**20,
        graphs: bool = False,
        native: bool = True,
        ahead: bool = False,
        limit: int | None = None,
    ) -> None:
        """`ahead`: each step is begun before the tokens of the one before are known, where that can be. `limit`: tokens
        of the longest text, as the runner is told."""
        self.bank = ColumnBank(device=next(model.parameters()).device, max_tokens=max_num_batched_tokens)
        self.runner = open_runner(model, self.bank, "tiny", native=native)
        self.runner.steering.install()
        self.blocks = self.runner.allocate(num_blocks, block_size, graphs=graphs, max_model_len=limit)
        for pool in self.runner.attention.pools.values():  # nothing may be read that was not written
            pool.keys.fill_(torch.nan)
            pool.values.fill_(torch.nan)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_logits=max_num_logits,
        )
        self.ahead = ahead
        self.begun_ahead = 0
        self.computed: list[int] = []  # tokens of each pass
        self.engine = Engine(self.runner, self.scheduler, eos=frozenset(), decode=lambda ids: "")
        self.engine.start(thread=False)
        self.finished: dict[Sequence, Finished] = {}
        self.events: list[Event] = []
        self._arriving: list[tuple[int, Sequence]] = []
        self._watch()

    def step(self) -> None:
        """One turn of the engine's loop, after which no invariant is broken."""
        self.engine.step()
        self.blocks.check(self.scheduler.running)

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.engine.submit([sequence], self.take)

    def run(self, sequences: list[Sequence], *, arrivals: list[int] | None = None) -> dict[Sequence, list[int]]:
        """The new tokens of sequences; sequence i arrives before pass `arrivals[i]`, or at once."""
        numbers = zip(arrivals or [0] * len(sequences), range(len(sequences)), strict=True)
        self._arriving = [(number, sequences[index]) for number, index in sorted(numbers)]
        passes = 0
        while any(sequence not in self.finished for sequence in sequences):
            self._arrive(max(passes, len(self.computed)))
            self.step()
            passes += 1
        return {sequence: list(self.finished[sequence].token_ids) for sequence in sequences}

    def _arrive(self, passes: int) -> None:
        while self._arriving and self._arriving[0][0] <= passes:
            self.add(self._arriving.pop(0)[1])

    def steered(self, sequence: Sequence) -> int:
        """How many of its tokens were steered, as the device counted them."""
        return self.finished[sequence].steered_tokens

    def finish(self, future: Future[T]) -> T:
        """What the engine says of something that was asked of it."""
        while not future.done():
            self.step()
        return future.result()

    def take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Failed):
            raise AssertionError(event.error)
        if isinstance(event, Finished):
            self.finished[event.sequence] = event

    def _watch(self) -> None:
        """Counts passes, and makes this a device where the host is free, or not."""
        runner, scheduler = self.runner, self.scheduler
        execute, schedule_ahead = runner.execute_async, scheduler.schedule_ahead

        def counted(chunks: tuple[ScheduledChunk, ...], *after: Any) -> Any:
            self.computed.append(sum(map(len, chunks)))
            return execute(chunks, *after)

        def foreseen(chunks: tuple[ScheduledChunk, ...]) -> tuple[ScheduledChunk, ...]:
            self._arrive(len(self.computed))
            following = schedule_ahead(chunks)
            self.begun_ahead += bool(following)
            return following

        runner.execute_async = counted  # type: ignore[method-assign]
        scheduler.schedule_ahead = foreseen  # type: ignore[method-assign]
        runner.__class__ = type("DeskRunner", (ModelRunner,), {"overlaps": self.ahead})


def sequence(tokens: tuple[int, ...], *, index: int = 0, request_id: str = "", **more: Any) -> Sequence:
    """One of a request of its own."""
    return Sequence(request_id or f"desk-{next(NAMES)}", index, tokens, **more)
