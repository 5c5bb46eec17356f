"""Tensors: computes the works that the scheduler chose, and draws the tokens that are due."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.forward import Forward
from server.engine.kv_cache import KVCache
from server.engine.sampler import Drawn, Sampler
from server.engine.tape import Tape, Work
from server.engine.team import Team
from server.engine.types import Draw, Likelihood, Row, Touch


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

    def step(self, works: Sequence[Work], meanwhile: Callable[[], None] = lambda: None) -> list[Outcome]:
        """The outcome of each work, in order. `meanwhile` is done before the host waits for the device."""
        ends = np.cumsum([len(work) for work in works]).tolist()
        drawing = {work.tape: end - 1 for work, end in zip(works, ends, strict=True) if work.draws}
        self.forward.steering.record(any(tape.row and tape.row.trace for tape in drawing))
        if drawing:
            self._prepare(list(drawing))
        logits, counts = self.compute(works, list(drawing.values()))
        drawn = self._draw(list(drawing), logits) if drawing else None
        # The one copy from the device that a step needs; logprobs, where asked for, are a second one.
        parts = [counts] if drawn is None else [counts, drawn.tokens, drawn.finite.long()]
        copy = HostCopy(torch.cat(parts))
        meanwhile()
        host = copy.numbers()
        touches = [self._touches(tape, place) for tape, place in drawing.items()]
        draws = iter(() if drawn is None else _draws(list(drawing), drawn, host[ends[-1] :], touches))
        return [
            Outcome(host[end - len(work) : end], next(draws) if work.draws else None)
            for work, end in zip(works, ends, strict=True)
        ]

    def compute(self, works: Sequence[Work], wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Forward`; before it, the keys and values that texts take over from others are copied."""
        self.team.look()
        moves, self.cache.moves = self.cache.moves, []
        with torch.inference_mode():
            self.forward.attention.move(moves)
        return self.forward(works, wanted)

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

    def _draw(self, tapes: Sequence[Tape], logits: Tensor) -> Drawn:
        assert self._sampler is not None, "prepared before"
        with torch.inference_mode():
            return self._sampler.draw(
                logits, [tape.tokens for tape in tapes], [len(tape.tokens) - tape.prompt for tape in tapes]
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
