"""Token ids to text, a piece at a time, never splitting a character."""

from collections.abc import Callable, Sequence

# Enough prompt for the decoder to know whether the first new piece starts with a space.
CONTEXT = 6
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one row's new tokens. Pieces put together are the whole text.

    A piece is the difference of two decodings that start a little earlier, because the text of a
    token depends on its neighbours (leading spaces, characters of several tokens).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._start = 0  # where both decodings start
        self._done = len(self._ids)  # ids whose text has been given out

    def push(self, token: int) -> None:
        self._ids.append(token)

    def read(self, *, final: bool = False) -> str:
        """The text since the last call; an unfinished character waits, unless `final`."""
        before = self._decode(self._ids[self._start : self._done])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before) or (after.endswith(INCOMPLETE) and not final):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return after[len(before) :]
