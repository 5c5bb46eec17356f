"""The tokens of one row, how far they have been computed, and where their keys and values lie."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from server.attention.places import Chunk, Extent
from server.engine.types import PositionsName, Row, Steer


@dataclass(eq=False)
class Tape:
    """Tokens of which the first `cached` have their keys and values in `extent`. The others are still to be computed:
    a whole prompt, the rest of one, or the token that was drawn last."""

    tokens: list[int]
    prompt: int  # tokens of the prompt; what follows was generated, or is read as if it were
    steer: Steer
    row: Row | None = None  # None: a text that is read, not generated
    cached: int = 0
    extent: Extent | None = None
    steered: list[int] = field(default_factory=list)  # how often each of the `cached` tokens was
    content: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # set by the cache

    @classmethod
    def of(cls, row: Row) -> "Tape":
        return cls(list(row.tokens), len(row.tokens), row.steer, row)

    @property
    def shareable(self) -> int:
        """Tokens that need not be computed where others have: all whose logits nobody wants."""
        return (len(self.tokens) if self.row else self.prompt) - 1

    @property
    def pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.tokens) - self.cached


@dataclass(frozen=True)
class Work:
    """Compute the tokens start..stop of a tape in the next forward pass."""

    tape: Tape
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> list[int]:
        return self.tape.tokens[self.start : self.stop]

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.tape.extent, self.start, self.stop)

    @property
    def draws(self) -> bool:
        """Whether the last logits are those of a token to draw: also where the last token itself is not known yet."""
        return self.stop >= len(self.tape.tokens)


def acts(positions: PositionsName, start: int, stop: int, prompt: int) -> NDArray[np.bool_]:
    """Which of the tokens start..stop of a text with `prompt` prompt tokens are steered.

    `generated` begins at the last prompt token: it is the one that produces the first new token.
    """
    index = np.arange(start, stop)
    if positions == "generated":
        return index >= prompt - 1
    if positions == "prompt":
        return index < prompt
    return np.ones(stop - start, dtype=np.bool_)
