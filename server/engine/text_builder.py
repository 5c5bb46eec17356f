"""A sequence's text while its tokens come: what is certain of it, and where a stop string ends it."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from server.engine.sequence import SamplingParams
from server.tokenizer import Decode, Detokenizer


@dataclass(frozen=True)
class Decoders:
    """Token ids to text: as readers want it, and with the special tokens that they do not want to see."""

    decode: Decode
    decode_all: Decode
    is_special: Callable[[int], bool]  # whether `decode` leaves a token out that `decode_all` shows

    @classmethod
    def of(cls, decode: Decode, decode_all: Decode | None = None) -> "Decoders":
        """`decode_all` None: there are no special tokens."""
        every = decode_all or decode
        return cls(decode, every, cache(lambda token: decode([token]) != every([token])))


class _Place(NamedTuple):
    """A place in the text that is shown."""

    characters: int  # before it
    unfinished: str = ""  # then what has begun there of a character that is not finished yet


class _Match(NamedTuple):
    """A stop string: where it ends and begins in the text that is shown."""

    end: int
    begin: _Place
    stop: str


class TextBuilder:
    """Tokens are pushed, `read` takes in the text that they make certain.

    A stop string is looked for in the text as it is shown and, as soon as there are special tokens that are not shown,
    also in the text with them. The text ends where the first stop string is complete, whatever its tokens are.
    """

    def __init__(self, decoders: Decoders, prompt: tuple[int, ...], sampling: SamplingParams) -> None:
        self.text = ""
        self._decoders = decoders
        self._stop = sampling.stop
        self._include = sampling.include_stop_str_in_output
        self._skip = sampling.skip_special_tokens
        self._shown = Detokenizer(decoders.decode if self._skip else decoders.decode_all, prompt)
        self._whole: _WholeText | None = None  # from the first special token on that is not shown
        self._ended = False

    def push(self, token: int) -> None:
        special = bool(self._stop) and self._skip and self._decoders.is_special(token)
        if special and self._whole is None:
            self._whole = _WholeText(self._shown.fork(self._decoders.decode_all), self.text)
        self._shown.push(token)
        if self._whole is not None:
            self._whole.push(token, special=special)

    def read(self, *, final: bool = False, stops: bool = True) -> bool:
        """Takes in what is new, `final`: with an unfinished character. `stops`: a stop string that is complete by now,
        and was not before, ends the text. Returns whether one has; behind the end there is nothing to take in."""
        if self._ended:
            return False
        old = len(self.text)
        self.text += self._shown.read(final=final)
        first = _first_match(self._stop, self.text, old) if stops and self._stop else None
        found = [_Match(first[0], _Place(first[1]), first[2])] if first else []
        if self._whole is not None:
            found += self._whole.read(self._stop if stops else (), len(self.text), final=final)
        if not found:
            return False
        _, begin, stop = min(found)
        self.text = self.text[: begin.characters] + begin.unfinished + stop * self._include
        self._ended = True
        return True

    def end(self, token: int) -> bool:
        """Takes in a token that ends the text, which shows it only where stop strings are shown. Returns whether a
        stop string has ended the text, be it one that this token completes."""
        if self.read(final=True):
            return True
        before, stopped = len(self.text), False
        if self._stop or self._include:
            self.push(token)
            stopped = self.read(final=True)
        if not stopped and not self._include:
            self.text = self.text[:before]
        self._ended = True
        return stopped

    @property
    def certain(self) -> int:
        """How many characters of the text no stop string can take back any more."""
        certain = len(self.text) - _unsure(self._stop, self.text)
        return certain if self._whole is None else min(certain, self._whole.certain(self._stop))


class _WholeText:
    """The text with special tokens, beside the one that is shown without them."""

    def __init__(self, detokenizer: Detokenizer, text: str) -> None:
        """`text`: what has been before the first special token, which is the same in both."""
        self._detokenizer = detokenizer
        self._text = text
        self._searched = len(text)
        self._lengths = [len(text)]  # after each token since then
        self._shown = [_Place(len(text))]  # and where that is in the text that is shown

    def push(self, token: int, *, special: bool) -> None:
        if special and (unfinished := self._detokenizer.read(final=True)):
            # A character that a special token cuts off; the text that is shown still waits for its end.
            self._text += unfinished
            self._lengths.append(len(self._text))
            self._shown.append(_Place(self._shown[-1].characters, unfinished))
        self._detokenizer.push(token)

    def read(self, stops: tuple[str, ...], shown: int, *, final: bool) -> list[_Match]:
        """`shown`: how long the text that is shown is now. Returns the stop string that is complete first of those
        that were not before, if there is one."""
        old, before = self._searched, self._shown[-1]
        self._text += self._detokenizer.read(final=final)
        self._searched = len(self._text)
        self._lengths.append(len(self._text))
        self._shown.append(_Place(shown, before.unfinished if shown == before.characters else ""))
        if (first := _first_match(stops, self._text, old)) is None:
            return []
        end, begin, stop = first
        return [_Match(self._at(end).characters, self._at(begin), stop)]

    def certain(self, stops: tuple[str, ...]) -> int:
        return self._at(len(self._text) - _unsure(stops, self._text)).characters

    def _at(self, characters: int) -> _Place:
        """Where in the text that is shown a place of this one is. Within a token both are counted from its end: its
        beginning may be a space that only one of them has."""
        after = bisect_left(self._lengths, characters)
        if after == 0:
            return _Place(characters)
        behind = self._lengths[after] - characters
        first, last = self._shown[after - 1], self._shown[after]
        if behind == 0:
            return last
        return max(first, _Place(last.characters - behind))


def _first_match(stops: tuple[str, ...], text: str, old: int) -> tuple[int, int, str] | None:
    """Where the stop string ends and begins that is complete first behind the first `old` characters, and which one it
    is. Of several that end there it is the longest."""
    places = [(text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in stops]
    return min(((begin + len(stop), begin, stop) for begin, stop in places if begin >= 0), default=None)


def _unsure(stops: tuple[str, ...], text: str) -> int:
    """How many characters at the end of the text may be the beginning of a stop string."""
    longest = max(map(len, stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(len(one) > length and one.startswith(text[-length:]) for one in stops):
            return length
    return 0
