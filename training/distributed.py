"""The processes of one command: several where `accelerate launch` or torchrun started it, else this one alone."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_TIMEOUT = timedelta(days=7)  # a process may have to wait as long as another one computes


@dataclass(frozen=True)
class Processes:
    """This process is number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """True in the one process that reports, and writes what belongs to all."""
        return self.index == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            _state().wait_for_everyone()


def launched() -> bool:
    """Whether this process is one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def joined(cpu: bool = False) -> Processes:
    """This process among those that were launched with it, which find each other on the first call.

    They use gloo with `cpu`, and where there is no CUDA device or `accelerate launch --cpu` said so; else NCCL.
    """
    if not launched():
        return Processes()
    state = _state(cpu)
    return Processes(state.process_index, state.num_processes)


def own_device(cpu: bool = False) -> str:
    """The device of this process, one of several: each on a machine has a GPU of its own."""
    device = _state(cpu).device
    return "cpu" if device.type == "cpu" else str(device)


def _state(cpu: bool = False) -> Any:
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    if PartialState._shared_state:
        return PartialState()
    cpu = cpu or not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    state = PartialState(cpu=cpu, timeout=_TIMEOUT)
    atexit.register(state.destroy_process_group)
    return state
