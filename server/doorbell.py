"""From other threads into an event loop."""

from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref


class Doorbell:
    """Makes calls in an event loop: all those of an engine's step for one wake-up of the loop.

    A wake-up costs a system call and a handle. `call_soon_threadsafe` for every token of 32 streams took longer than
    what the calls do.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._rung = False

    @classmethod
    def of(cls, loop: AbstractEventLoop) -> "Doorbell":
        """The one that this loop has; to be called in the loop."""
        if loop not in _doorbells:
            _doorbells[loop] = cls(loop)
        return _doorbells[loop]

    def ring(self, call: Callable[..., object], *arguments: Any) -> None:
        """On any thread. Calls are made in the order in which they come. Raises RuntimeError after the loop's end."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("the event loop has ended")
        self._calls.append((call, arguments))
        if not self._rung:
            self._rung = True
            loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # first: what comes from here on rings again, or is found below
        while self._calls:
            call, arguments = self._calls.popleft()
            try:
                call(*arguments)
            except Exception as error:  # of one request: the others' calls are made
                loop = self._loop()
                assert loop is not None, "it runs this"
                loop.call_exception_handler({"message": "a call from another thread failed", "exception": error})


_doorbells: WeakKeyDictionary[AbstractEventLoop, Doorbell] = WeakKeyDictionary()
