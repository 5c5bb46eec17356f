"""`matsteer serve` with the engine in a process of its own: starts it and the fronts, and sees to it that they end
together."""

import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from server.config import Settings
from server.errors import StartupError
from server.process.counting import count_together
from server.shared_folder import SharedFolder
from server.sockets import FORCED_S, LAST_WORDS_S, bind_again, claim
from steering.imports import importing

log = logging.getLogger(__name__)
PAUSE_S = 1.0  # before a front that could not take the place of another one is started again
LATE_S = 10.0  # after which a front is killed that does not end by itself as the engine has
# All have ended two seconds after the drain: fronts that do not end by themselves (FORCED_S) are killed so much later,
# the engine after them.
FRONTS_LATER_S = 0.1
ENGINE_LATER_S = 0.2
Configure = Callable[[Settings], None]  # sets logging up, in each process
Main = Callable[..., None]  # what a process runs; its module is imported there
_spawn = multiprocessing.get_context("spawn")


def _close(sockets: Iterable[socket.socket]) -> None:
    for one in sockets:
        one.close()


def how_it_ended(exitcode: int | None) -> str:
    """Of a process of `multiprocessing`."""
    return f"killed by signal {-exitcode}" if exitcode is not None and exitcode < 0 else f"exit status {exitcode}"


class _Child:
    """A process of ours, and the pipe on which it says `ready`, or the sentence with which it cannot start."""

    def __init__(self, name: str, main: Main, *arguments: Any) -> None:
        self.name = name
        self.ready = False
        self.pipe, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=main, args=(theirs, *arguments), name=name)
        self.process.start()
        theirs.close()

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    @property
    def how_it_ended(self) -> str:
        return how_it_ended(self.process.exitcode)

    def read(self) -> Any:
        """What it says; None where it has ended without a word. Raises StartupError where it cannot start."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None
        if isinstance(said, str):
            self.process.join()
            raise StartupError(said)
        self.ready = True
        return said

    def end(self, deadline: float) -> None:
        """Waits for its end; from `deadline` (time.monotonic) on it is killed."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.exitcode is None:
            log.error("%s has not ended in time, and is killed", self.name)
            self.process.kill()
            self.process.join()


class Supervisor:
    """The first process. It has nothing to do with requests, so that it stays whatever becomes of the others."""

    def __init__(
        self, settings: Settings, bound: socket.socket, configure: Configure, folder: Path, run_engine: Main
    ) -> None:
        """`bound`: closed here where several fronts have sockets of their own in its place. `folder`: for the socket
        between the processes. `run_engine`: see `server.process.workers`."""
        self._run_engine = run_engine
        self._settings = settings
        self._bound = bound
        self._configure = configure
        self._path = folder / "engine"
        self._facts: bytes | None = None  # of the engine, as it has encoded them: this process need not know them
        self._drained = self._deadline = float("inf")  # of time.monotonic
        self._ending = False
        self._children: list[_Child] = []

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT; returns the exit status. Raises StartupError."""
        signals = {number: signal.signal(number, self._asked_to_end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run()
        finally:
            for child in self._children:
                if not child.ended:
                    child.process.kill()
                    child.process.join()
            for number, before in signals.items():
                signal.signal(number, before)

    def _run(self) -> int:
        self._engine = _Child("the engine", self._run_engine, self._settings, self._path, self._configure)
        self._children.append(self._engine)
        with ExitStack() as stack:
            workers = self._settings.front_workers
            sockets = [self._bound] if workers == 1 else [bind_again(self._bound) for _ in range(workers)]
            stack.callback(_close, sockets)
            self._fronts = [self._start_front(index, one) for index, one in enumerate(sockets)]
            while not self._ending or any(not front.ended for front in self._fronts):
                self._look(sockets)
                if self._engine.ended and not self._ending:
                    log.critical("the engine's process has ended (%s): the server ends", self._engine.how_it_ended)
                    self._end_fronts(LATE_S)
                now = time.monotonic()
                if now > self._drained + LAST_WORDS_S:
                    self._engine.pipe.close()  # which asks it to end
                if now > self._deadline:
                    for front in self._fronts:
                        front.end(self._deadline)
        self._engine.pipe.close()
        self._engine.end(self._deadline + ENGINE_LATER_S)
        return 0 if all(child.process.exitcode == 0 for child in self._children) else 1

    def _start_front(self, index: int, bound: socket.socket) -> _Child:
        front = _Child(f"front {index}", _run_front, self._settings, bound, self._path, self._configure, index == 0)
        self._children.append(front)
        if self._facts is not None:
            front.pipe.send(self._facts)
        return front

    def _look(self, sockets: list[socket.socket]) -> None:
        """Waits until a process has something to say, or has ended."""
        alive = [child for child in (self._engine, *self._fronts) if not child.ended]
        pipes: dict[Any, _Child] = {child.pipe: child for child in alive if not child.ready}
        sentinels: dict[Any, _Child] = {child.process.sentinel: child for child in alive}
        for one in wait([*pipes, *sentinels], timeout=0.1 if self._ending else 1.0):
            if (child := pipes.get(one)) is not None:
                self._hear_or_log(child)
        for index, front in enumerate(self._fronts):
            if not front.ended or self._ending or self._engine.ended:
                continue
            if not front.ready:
                self._hear_or_log(front)  # why it cannot, where it has said so
                if not self._can_do_without(front):
                    raise StartupError(f"A front process cannot start ({front.how_it_ended}).")
                time.sleep(PAUSE_S)
            log.error("%s has ended (%s), and its requests with it: another one starts", front.name, front.how_it_ended)
            self._children.remove(front)
            if len(sockets) > 1:  # one that does not listen yet: until then the others get the connections
                sockets[index].close()
                sockets[index] = bind_again(sockets[index - 1])
            self._fronts[index] = self._start_front(index, sockets[index])

    def _can_do_without(self, child: _Child) -> bool:
        """A front that is to take the place of another one, while others serve."""
        others = (one for one in self._fronts if one is not child)
        return child is not self._engine and any(one.ready and not one.ended for one in others)

    def _hear_or_log(self, child: _Child) -> None:
        try:
            self._hear(child)
        except StartupError as error:
            if not self._can_do_without(child):
                raise
            log.error("%s cannot start: %s", child.name, error.message)

    def _hear(self, child: _Child) -> None:
        said = child.read()
        if child is not self._engine:
            return
        if said is None:
            if not self._ending:
                raise StartupError(f"The engine's process cannot start ({child.how_it_ended}).")
            return
        self._facts = said
        if self._settings.front_workers > 1:
            claim(self._bound)  # nobody else has the port; from now on those of the fronts are there
            self._bound.close()
        for front in self._fronts:
            front.pipe.send(self._facts)

    def _asked_to_end(self, number: int, frame: FrameType | None) -> None:
        if self._ending or self._facts is None:  # a second signal, or nothing runs yet
            raise SystemExit(128 + number)
        self._drained = time.monotonic() + self._settings.drain_s
        self._end_fronts(self._settings.drain_s + FORCED_S + FRONTS_LATER_S)

    def _end_fronts(self, seconds: float) -> None:
        """They drain, and are killed after so long."""
        self._ending, self._deadline = True, time.monotonic() + seconds
        for front in self._fronts:
            if not front.ended:
                front.process.terminate()


def _run_engine(*arguments: Any) -> None:
    with importing():
        from server.process.workers import run_engine

    run_engine(*arguments)


def _run_front(*arguments: Any) -> None:
    with importing():
        from server.process.workers import run_front

    run_front(*arguments)


def is_wanted(settings: Settings) -> bool:
    """Whether the engine runs in a process of its own. Raises StartupError where it cannot."""
    if not hasattr(socket, "AF_UNIX"):
        if settings.engine_process == "true" or settings.front_workers > 1 or settings.tensor_parallel_size > 1:
            raise StartupError("This system has no Unix sockets, which the processes of engine_process talk through.")
        return False
    if settings.engine_process != "auto" or settings.front_workers > 1 or settings.tensor_parallel_size > 1:
        return settings.engine_process != "false"
    if settings.device == "auto":
        with importing():
            import torch

        return torch.cuda.is_available()
    return settings.device.startswith("cuda")


def serve(settings: Settings, bound: socket.socket, configure: Configure, *, run_engine: Main = _run_engine) -> int:
    """Serves with the engine in a process of its own; returns the exit status. Raises StartupError."""
    with SharedFolder() as folder:
        if settings.front_workers > 1:
            count_together(folder / "metrics")
        return Supervisor(settings, bound, configure, folder, run_engine).run()
