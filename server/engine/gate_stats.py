"""What the columns of each checkpoint do to the tokens that are looked at: gates and norms, counted for metrics."""

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from server.engine.sequence import ScheduledChunk
from steering.types import Handle

SAMPLE_S = 2.0  # a step is looked at so often, at most
SAMPLED_ROWS = 8  # texts of it, at most
CLOSED, OPEN = 0.01, 0.99  # a gate below or above is saturated
GATES = (CLOSED, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, OPEN, math.inf)
NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, math.inf)
GATE, DELTA_NORM = 0, 2  # among the measures of a trace


@dataclass
class Tally:
    """A histogram: how many values are at most each bound, and no more than the bound before."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.bounds)

    def add(self, values: NDArray[np.floating]) -> None:
        for place in np.searchsorted(self.bounds, values).tolist():
            self.counts[place] += 1
        self.total += float(values.sum())

    def cumulative(self) -> list[tuple[str, int]]:
        """Prometheus' buckets."""
        names = ("+Inf" if math.isinf(bound) else f"{bound:g}" for bound in self.bounds)
        return list(zip(names, np.cumsum(self.counts).tolist(), strict=True))


@dataclass
class AttributeStats:
    """Of one attribute, over all its columns and the tokens that were looked at."""

    gates: Tally = field(default_factory=lambda: Tally(GATES))
    delta_norms: Tally = field(default_factory=lambda: Tally(NORMS))  # |multiplier x gate x v|
    saturated: int = 0  # gates

    def add(self, measures: NDArray[np.floating]) -> None:
        """measures [N, 4]: of a column, as a trace has them."""
        seen = measures[np.isfinite(measures).all(axis=1)]
        gates = seen[:, GATE]
        self.gates.add(gates)
        self.delta_norms.add(seen[:, DELTA_NORM])
        self.saturated += int(((gates <= CLOSED) | (gates > OPEN)).sum())


class GateStats:
    """A sample: of one step in SAMPLE_S some steered texts, each with the token that is computed last. Looking at every
    token would cost every step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = -math.inf
        self._seen: weakref.WeakKeyDictionary[Handle, dict[str, AttributeStats]] = weakref.WeakKeyDictionary()

    def choose(self, sampling: Iterable[ScheduledChunk]) -> tuple[ScheduledChunk, ...]:
        """Whom to look at in this step: mostly nobody."""
        if (now := self._clock()) < self._next:
            return ()
        steered = [chunk for chunk in sampling if chunk.sequence.steering_params.columns.slots]
        if steered:
            self._next = now + SAMPLE_S
        return tuple(steered[:SAMPLED_ROWS])

    def add(self, chunk: ScheduledChunk, traces: Mapping[object, NDArray[np.floating]], row: int) -> None:
        """traces: of each site [rows, columns, 4]; `row`: the one of this chunk's last token, which was steered."""
        asked = {(site, index) for site, index, _ in chunk.sequence.steering_params.columns.slots}
        for handle in chunk.sequence.steering_params.columns.handles:
            by_attribute = self._seen.setdefault(handle, {})
            for attribute, (site, index) in zip(handle.attributes, handle.slots, strict=True):
                if (site, index) in asked:
                    by_attribute.setdefault(attribute, AttributeStats()).add(traces[site][row, index][None])

    def of(self, handle: Handle) -> Mapping[str, AttributeStats]:
        """By attribute; for any thread."""
        return dict(self._seen.get(handle, {}))
