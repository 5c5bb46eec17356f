"""Tensors: computes the works that the scheduler chose, and draws the tokens that are due."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.forward import Forward
from server.engine.kv_cache import KVCache
from server.engine.sampler import Drawn, Sampler
from server.engine.tape import Tape, Work
from server.engine.types import Draw, Likelihood, Row, Touch
from server.threads import Team
from steering.row_table import upload


@dataclass(frozen=True)
class Outcome:
    """What one step gives one work."""

    steered: list[int]  # how often each token was steered; counted on the device, inside the steering hook
    draw: Draw | None  # None: the work did not reach the end of its tape


class HostCopy:
    """Numbers on their way from the device."""

    def __init__(self, numbers: Tensor) -> None:
        """numbers: [N] int64."""
        self._ready: Any = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(numbers.device))

    def numbers(self) -> list[int]:
        """Waits until they are here. Raises what the device's computation raised."""
        if self._ready is not None:
            self._ready.synchronize()
        found: list[int] = self._numbers.tolist()
        return found


@dataclass(frozen=True)
class Step:
    """A step that the device computes."""

    works: Sequence[Work]
    drawing: Mapping[Work, int] = field(default_factory=dict)  # those that draw, with their last tokens' places
    drawn: Drawn | None = None
    copy: HostCopy | None = None
    touches: Callable[[Tape, int], tuple[Touch, ...]] = lambda tape, place: ()
    error: Exception | None = None  # instead of all that

    def tokens_of(self, works: Sequence[Work]) -> Tensor:
        """What this step draws for the texts of works that continue it, [works] int64, on the device."""
        if self.drawn is None:
            raise self.error or ValueError("nothing continues a step that draws nothing")
        places = {work.tape: index for index, work in enumerate(self.drawing)}
        wanted = [places[work.tape] for work in works]
        if wanted == list(range(len(places))):
            return self.drawn.tokens
        return self.drawn.tokens[upload(np.array(wanted), self.drawn.tokens.device)]

    def outcomes(self) -> list[Outcome]:
        """Of each work, in order. Waits for the device. Raises what its computation raised."""
        if self.copy is None:
            raise self.error or ValueError("this step was never begun")
        host = iter(self.copy.numbers())
        steered = [list(islice(host, len(work))) for work in self.works]
        touches = [self.touches(work.tape, place) for work, place in self.drawing.items()]
        tapes = [work.tape for work in self.drawing]
        draws = iter(_draws(tapes, self.drawn, list(host), touches) if self.drawn else ())
        return [
            Outcome(mine, next(draws) if work in self.drawing else None)
            for work, mine in zip(self.works, steered, strict=True)
        ]


class Runner:
    """One forward pass and one draw a step."""

    def __init__(self, forward: Forward, cache: KVCache, *, step_tokens: int) -> None:
        """`step_tokens`: how many tokens one forward pass may have."""
        self.forward = forward
        self.cache = cache
        self.step_tokens = step_tokens
        self.vocab: int = forward.vocab
        self.team = Team(torch.get_num_threads() if forward.device.type == "cpu" else 1)
        self._rows: list[Row | None] = []  # those the sampler was made for
        self._sampler: Sampler | None = None

    @property
    def overlaps(self) -> bool:
        """Whether the host is free while the device computes."""
        return self.forward.device.type == "cuda"

    def launch(self, works: Sequence[Work], after: Step | None = None) -> Step:
        """Begins a step; why that could not be, its outcomes say. `after`: the one before, where its tokens are not
        known yet: they go from one to the other on the device."""
        try:
            return self._launch(works, after)
        except Exception as error:
            return Step(works, error=error)

    def _launch(self, works: Sequence[Work], after: Step | None) -> Step:
        ends = np.cumsum([len(work) for work in works]).tolist()
        drawing = {work: end - 1 for work, end in zip(works, ends, strict=True) if work.draws}
        self.forward.steering.record(any(work.tape.row and work.tape.row.trace for work in drawing))
        if drawing:
            self._prepare([work.tape for work in drawing])
        ids = None if after is None else after.tokens_of(works)
        logits, counts = self.compute(works, list(drawing.values()), ids)
        drawn = self._draw(list(drawing), logits) if drawing else None
        # The one copy from the device that a step needs; logprobs, where asked for, are a second one.
        parts = [counts] if drawn is None else [counts, drawn.tokens, drawn.finite.long()]
        return Step(works, drawing, drawn, HostCopy(torch.cat(parts)), touches=self._touches)

    def compute(self, works: Sequence[Work], wanted: Sequence[int], ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Forward`; before it, the keys and values that texts take over from others are copied."""
        self.team.look()
        moves, self.cache.moves = self.cache.moves, []
        with torch.inference_mode():
            self.forward.attention.move(moves)
        return self.forward(works, wanted, ids)

    def recover(self) -> None:
        """After a failed step: forget what may be damaged; raises when the device does not answer any more."""
        self.cache.forget()
        self._sampler, self._rows = None, []
        torch.zeros(1, device=self.forward.device).add_(1).item()

    def _touches(self, tape: Tape, place: int) -> tuple[Touch, ...]:
        """What the columns that the tape asks for did to the token at a place of the line."""
        if tape.row is None or not tape.row.trace:
            return ()
        asked = [(h.attributes[i], *slot) for h in tape.steer.columns.handles for i, slot in enumerate(h.slots)]
        traces = self.forward.steering.traces
        numbers = {site: traces[site][place].tolist() for _, site, _ in asked}
        return tuple(Touch(attribute, str(site), *numbers[site][index]) for attribute, site, index in asked)

    def _prepare(self, tapes: Sequence[Tape]) -> None:
        """The sampler of these rows; before the forward pass, whose end its copies to the device would wait for."""
        rows = [tape.row for tape in tapes]
        if self._sampler is None or rows != self._rows:
            rules = [row.sampling for row in rows if row]
            self._sampler, self._rows = Sampler(rules, self.vocab, self.forward.device), rows

    def _draw(self, works: Sequence[Work], logits: Tensor) -> Drawn:
        assert self._sampler is not None, "prepared before"
        with torch.inference_mode():
            return self._sampler.draw(
                logits, [work.tape.tokens for work in works], [work.stop - work.tape.prompt for work in works]
            )


def _draws(tapes: Sequence[Tape], drawn: Drawn, host: list[int], touches: Sequence[tuple[Touch, ...]]) -> list[Draw]:
    tokens, finite = host[: len(tapes)], host[len(tapes) :]
    chosen = drawn.logprobs.tolist() if drawn.logprobs is not None else None
    top_tokens = drawn.top_tokens.tolist() if drawn.top_tokens is not None else None
    top_logprobs = drawn.top_logprobs.tolist() if drawn.top_logprobs is not None else None
    draws = []
    for i, tape in enumerate(tapes):
        wanted = tape.row.sampling.logprobs if tape.row else None
        likelihood = None
        if chosen and wanted is not None:
            top = (tuple(most[i][:wanted]) for most in (top_tokens, top_logprobs) if most)
            likelihood = Likelihood(tokens[i], chosen[i], *top)
        draws.append(Draw(tokens[i], bool(finite[i]), likelihood, touches[i]))
    return draws
