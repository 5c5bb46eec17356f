"""The process in which parts run: what they make is kept for the next ones, and a part that crashes or hangs takes only
itself along, for the next one gets a new process."""

import contextlib
import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Figure

DUMP_S = 0.5  # for the stacks of a process that hangs to get into the log
CLOSING_S = 5.0  # for a process that has nothing more to do


class PartFailed(Exception):
    """A part did not come to its end; the message says why."""


class Skipped(Exception):
    """A part cannot be measured here; the message says why. Raised by parts."""


@dataclass(frozen=True)
class Options:
    """What a process needs to know."""

    device: str
    shape: str
    scratch: Path  # a folder for what is large and not to be kept
    log: Path  # what the parts print
    world: str = "benchmarks.gpu.world:World"  # module:class of what the parts get


@dataclass(frozen=True)
class _Failed:
    why: str


@dataclass(frozen=True)
class _Skipped:
    why: str


class _Done:
    """The part has no more figures."""


class Worker:
    """Where parts run. Use it as a context manager."""

    def __init__(self, options: Options) -> None:
        self.machine: dict[str, Any] = {}  # known once a process has begun
        self._options = options
        self._process: Any = None
        self._pipe: Connection[Any, Any]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._pipe.close()  # which ends it
            self._process.join(CLOSING_S)
        self._kill()

    def look(self, limit: float) -> None:
        """What machine this is. Raises PartFailed where nothing can be measured on it."""
        for _ in self.figures("benchmarks.gpu.worker:nothing", limit):
            pass

    def figures(self, function: str, limit: float) -> Generator[Figure, None, None]:
        """What a part measures, as it comes, for `limit` seconds. Raises PartFailed, Skipped."""
        end = time.monotonic() + limit
        self._ask(function)
        well = False
        try:
            while not well:
                message = self._receive(end, limit)
                well = isinstance(message, _Done | _Skipped)
                match message:
                    case Figure():
                        yield message
                    case dict():
                        self.machine = message
                    case _Skipped(why):
                        raise Skipped(why)
                    case _Failed(why):
                        raise PartFailed(why)
        finally:
            if not well:  # what it still says is no other part's, and its device may fail everything that comes after
                self._kill()

    def _ask(self, function: str) -> None:
        """Of a new process, where the last one has died since its part ended."""
        if self._process is not None:
            try:
                self._pipe.send(function)
                return
            except OSError:
                self._kill()
        self._start()
        self._pipe.send(function)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self._options))
        self._process.start()
        theirs.close()

    def _receive(self, end: float, limit: float) -> Any:
        try:
            if self._pipe.poll(max(0.0, end - time.monotonic())):
                return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._kill()
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise PartFailed(f"its process {ended}") from None
        os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(DUMP_S)
        self._kill()
        raise PartFailed(f"it took longer than {limit:.0f} s; the log says where it was")

    def _kill(self) -> None:
        """With all that the process has started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = None


def serve(pipe: "Connection[Any, Any]", options: Options) -> None:
    """Runs the parts that the pipe names, until it is closed."""
    os.setpgrp()
    log = options.log.open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    world: Any = None
    while True:
        try:
            function = pipe.recv()
        except EOFError:
            return
        print(f"--- {function}", flush=True)
        try:
            if world is None:
                world = named(options.world)(options)
                pipe.send(world.described())
            _run(function, world, pipe)
            pipe.send(_Done())
        except Skipped as skipped:
            pipe.send(_Skipped(str(skipped)))
        except Exception as error:
            traceback.print_exc()
            pipe.send(_Failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
        finally:
            sys.stdout.flush()


def nothing(world: Any) -> Iterator[Figure]:
    """The part that measures nothing: for its process to begin."""
    yield from ()


def _run(function: str, world: Any, pipe: "Connection[Any, Any]") -> None:
    """Raises what the part raises, and Skipped where it begins with a package that is missing as a whole."""
    begun = False
    try:
        for figure in named(function)(world):
            begun = True
            pipe.send(figure)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if begun or not package or importlib.util.find_spec(package) is not None:
            raise
        traceback.print_exc()
        raise Skipped(f"{package} is not installed") from missing


def named(name: str) -> Any:
    """What is called module:name."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
