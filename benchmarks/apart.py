"""A contender in a process of its own.

OpenMP keeps a team of threads for every thread of a process that has computed, and lets none of them wait actively once
there are more than cores: contenders in one process would slow each other down although only one runs at a time.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch
import transformers

from benchmarks.contenders import Contender
from benchmarks.workload import Request
from server.threads import run_in_disposable_thread


class Apart:
    """The contender that `make` makes, elsewhere. Raises RuntimeError with its reason where it cannot be made."""

    def __init__(self, make: Callable[[], Contender]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, torch.get_num_threads()), daemon=True)
        self._process.start()
        self.name, self.subset = self._answer()

    def __call__(self, requests: Sequence[Request]) -> None:
        self._pipe.send(list(requests))
        self._answer()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()

    def _answer(self) -> tuple[str, int | None]:
        try:
            answer: tuple[str, int | None] | Exception = self._pipe.recv()
        except EOFError:
            raise RuntimeError("its process has ended") from None
        if isinstance(answer, Exception):
            raise RuntimeError(str(answer))
        return answer


def _serve(pipe: "Connection[object, object]", make: Callable[[], Contender], threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        contender = run_in_disposable_thread(make)
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    pipe.send((contender.name, contender.subset))
    while (requests := pipe.recv()) is not None:
        try:
            contender(requests)  # type: ignore[arg-type]
            pipe.send((contender.name, contender.subset))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
    contender.close()
