"""Token ids to text, a piece at a time, never splitting a character."""

from collections.abc import Callable, Sequence

# Enough prompt for the decoder to know whether the first new piece starts with a space.
CONTEXT = 6
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST_RUN = 64  # ids without a certain end; beyond, those whose text cannot change any more are left behind
LEFT = 8  # ids of such a run that stay: what comes can only change the text of the last few
UNSURE = 3  # at most so many of these at the end may still become a character: UTF-8 has up to four bytes


class Detokenizer:
    """The text of one row's new tokens. Pieces put together are the whole text.

    A piece is the difference of two decodings that start a little earlier, because the text of a
    token depends on its neighbours (leading spaces, characters of several tokens).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._start = 0  # where both decodings start
        self._done = len(self._ids)  # ids whose text has been given out whole
        self._given = 0  # characters of the text of later ids that have been given out

    def push(self, token: int) -> None:
        self._ids.append(token)

    def read(self, *, final: bool = False) -> str:
        """The text since the last call; an unfinished character waits, unless `final`."""
        before = self._decode(self._ids[self._start : self._done])
        after = self._decode(self._ids[self._start :])
        given = len(before) + self._given
        if len(after) <= given:
            return ""
        if after.endswith(INCOMPLETE) and not final:
            waiting = min(UNSURE, len(after) - len(after.rstrip(INCOMPLETE)))
            piece = after[given : len(after) - waiting]
            self._given += len(piece)
            if len(self._ids) - self._done > LONGEST_RUN:
                self._move_on(after, len(after) - waiting)
            return piece
        self._start, self._done, self._given = self._done, len(self._ids), 0
        return after[given:]

    def _move_on(self, text: str, given: int) -> None:
        """Both decodings start later, if that changes nothing. text: of all ids from where they start now, of which so
        many characters have been given out. Else bytes that never become characters would all be decoded each time."""
        done = len(self._ids) - LEFT
        start = done - CONTEXT
        known, before = self._decode(self._ids[self._start : done]), self._decode(self._ids[start:done])
        if len(known) <= given and known + self._decode(self._ids[start:])[len(before) :] == text:
            self._start, self._done, self._given = start, done, given - len(known)
