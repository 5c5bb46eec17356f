"""A process that has one of the other shards: it opens the model as the one that leads does, then does what it says."""

import logging
import multiprocessing
import signal
import threading
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
from transformers.utils import logging as hf_logging

from server.assembly import open_cached_runner
from server.config import Settings
from server.ending import end
from server.engine.model_runner import ForwardInputs, ModelRunner
from server.errors import StartupError
from server.loading import choose_device, load_model
from server.logs import configure_logging
from server.parallel.group import Place, join
from server.parallel.messages import (
    AddColumns,
    CopyBlocks,
    Forward,
    RemoveColumns,
    Row,
    ToFollower,
    decode,
    from_bytes,
)
from steering.types import Handle, SequenceSteering

log = logging.getLogger(__name__)


def follow(leader: Connection, settings: Settings, place: Place) -> None:
    """Until the one that leads closes its end of the pipe, or ends. Signals are for that one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    if settings.log_level == "info":  # what all have in common is said once
        settings = settings.model_copy(update={"log_level": "warning"})
    configure_logging(settings)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    status = 1
    try:
        join(place, choose_device(settings))
        _Follower(open_cached_runner(settings, load_model(settings))).run(leader)
        status = 0
    except StartupError as error:
        log.critical("shard %d cannot start: %s", place.rank, error.message)
    except Exception:
        log.critical("shard %d failed", place.rank, exc_info=True)
    end(status)


class _Follower:
    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        runner.steering.warm_up()
        self._handles: dict[int, Handle] = {}  # of this process, by the serial of the one that leads
        self._rows: dict[Row, SequenceSteering] = {}  # of the pass before: the same object says that nothing is new

    def run(self, leader: Connection) -> None:
        while True:
            try:
                data = leader.recv_bytes()
            except (EOFError, OSError):
                return
            self._take(decode(data))

    def _take(self, message: ToFollower) -> None:
        match message:
            case AddColumns(serial=serial, columns=columns):
                self._handles[serial] = self._runner.bank.add(columns)
            case RemoveColumns(serial=serial):
                self._runner.bank.remove(self._handles.pop(serial))
            case CopyBlocks(copies=copies):
                with torch.inference_mode():
                    self._runner.attention.copy(copies)
            case Forward():
                self._forward(message)

    def _forward(self, message: Forward) -> None:
        self._rows = {row: self._rows.get(row) or self._row(row) for row in message.rows}
        lines = message.token_lines
        inputs = ForwardInputs(
            chunks=message.chunks,
            num_rows=message.num_rows,
            rows=tuple(self._rows[row] for row in message.rows),
            token_rows=from_bytes(message.token_rows),
            token_lines=None if lines is None else from_bytes(lines).reshape(2, -1),
            num_lines=message.num_lines,
        )
        ids = torch.empty(inputs.num_tokens, dtype=torch.int64, device=self._runner.device)
        dist.broadcast(ids, src=0)
        self._runner.follow(inputs, ids, traced=message.traced)

    def _row(self, row: Row) -> SequenceSteering:
        return SequenceSteering.of((self._handles[serial], multipliers) for serial, multipliers in row)


def _end_with_parent() -> None:
    """Also in the middle of a pass that the other processes do not finish."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it has been started by the one that leads"

    def watch() -> None:
        wait([parent.sentinel])
        end(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
