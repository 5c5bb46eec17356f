"""The process that leads: it has the engine and the first shard, starts the others, and tells them what to compute."""

import logging
import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from server.attention.layout import BlockCopy
from server.config import Settings
from server.ending import end
from server.engine.model_runner import ForwardInputs, ModelRunner
from server.parallel import group
from server.parallel.group import Place
from server.parallel.messages import AddColumns, CopyBlocks, Forward, RemoveColumns, ToFollower, encode, to_bytes
from server.process.supervisor import how_it_ended
from server.shared_folder import SharedFolder
from steering.bank import ColumnBank
from steering.column import Column
from steering.errors import SteeringError
from steering.types import Handle

log = logging.getLogger(__name__)
FIRST_S = 10.0  # while they start: so long this process has to say itself why it cannot, before it ends for another one
CAUSE_S = 1.0  # after which a pass has failed for another reason than the end of a process
LATE_S = 10.0  # after which one that is to end is killed
_spawn = multiprocessing.get_context("spawn")


class Leader:
    """The other processes of a model, from their start to `close`. Where one of them ends before that, so does this
    one: what they compute together cannot go on. Columns are added to the banks of all, and removed, here."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._size, self._device = settings.tensor_parallel_size, device
        self._closing = threading.Event()
        self._ending = threading.Lock()
        self._serving = False
        self._bank: ColumnBank | None = None
        self._folder = SharedFolder()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank in range(1, self._size):
                ours, theirs = _spawn.Pipe()
                self._pipes.append(ours)
                process = _spawn.Process(
                    target=_follow, args=(theirs, settings, self._place(rank)), name=f"shard {rank}"
                )
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, name="shards", daemon=True).start()

    def join(self) -> None:
        """The group of all, from the thread that opens the model."""
        group.join(self._place(0), self._device)

    def lead(self, runner: ModelRunner) -> None:
        """From now on the others, who have opened their shards as this process has, do what is said here."""
        self._bank = runner.bank
        self._serving = True
        runner.followers = self

    def close(self) -> None:
        """Ends the others, and the group."""
        self._closing.set()
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + LATE_S
        for process in self._processes:
            if self._serving:  # else it may wait for this process in the middle of its start
                process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                if self._serving:
                    log.error("%s has not ended in time, and is killed", process.name)
                process.kill()
                process.join()
        group.leave()
        self._folder.close()

    # --- columns --------------------------------------------------------------------------------

    def add(self, columns: Sequence[Column]) -> Handle:
        """See `ColumnBank.add`."""
        assert self._bank is not None, "it leads"
        try:
            handle = self._bank.add(columns)
        except SteeringError:  # before anything has changed
            raise
        except Exception as error:  # the bank may hold what those of the others do not
            self._end("columns cannot be added to a model in several processes", error)
        self._tell(AddColumns(handle.serial, list(columns)))
        return handle

    def remove(self, handle: Handle) -> None:
        """See `ColumnBank.remove`."""
        assert self._bank is not None, "it leads"
        self._bank.remove(handle)
        self._tell(RemoveColumns(handle.serial))

    # --- what the runner does, the others do (`Followers`) ----------------------------------------

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        self._tell(CopyBlocks(list(copies)))

    @contextmanager
    def forward(self, inputs: ForwardInputs, ids: Tensor, *, traced: bool) -> Iterator[None]:
        """A pass that fails in one process leaves the others in the middle of theirs: then all end."""
        rows = [tuple((handle.serial, values) for handle, values in row.parts) for row in inputs.rows]
        lines = None if inputs.token_lines is None else to_bytes(inputs.token_lines)
        self._tell(
            Forward(inputs.chunks, inputs.num_rows, rows, to_bytes(inputs.token_rows), lines, inputs.num_lines, traced)
        )
        try:
            with torch.inference_mode():
                dist.broadcast(ids, src=0)
            yield
        except Exception as error:
            self._end("a pass of a model in several processes has failed", error)

    # --- inside ---------------------------------------------------------------------------------

    def _place(self, rank: int) -> Place:
        return Place(rank, self._size, self._folder.path / "group")

    def _tell(self, message: ToFollower) -> None:
        data = encode(message)
        for pipe in self._pipes:
            try:
                pipe.send_bytes(data)
            except OSError:
                self._end("a process of the model does not listen")

    def _watch(self) -> None:
        wait([process.sentinel for process in self._processes])
        if not self._closing.wait(0.0 if self._serving else FIRST_S):
            self._end("")

    def _end(self, why: str, error: Exception | None = None) -> NoReturn:
        """This process, at once: its own thread may wait for the others for ever, and whoever waits for it sees it.
        `why`, unless it is that one of the others has ended."""
        self._ending.acquire()  # whoever comes second waits for the end
        try:
            if ready := wait([process.sentinel for process in self._processes], CAUSE_S):
                ended = next(process for process in self._processes if process.sentinel in ready)
                ended.join(CAUSE_S)  # its files are closed before it can be waited for
                why, error = f"{ended.name} of the model has ended ({how_it_ended(ended.exitcode)})", None
            log.critical("%s: this process ends", why, exc_info=error)
            self._folder.close()
        finally:
            end(1)


def _follow(*arguments: Any) -> None:
    from server.parallel.follower import follow

    follow(*arguments)
