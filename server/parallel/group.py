"""The processes that hold a model together, as torch.distributed knows them: gloo on a CPU, NCCL on GPUs."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=2)  # the first to have read its weights waits for the last


@dataclass(frozen=True)
class Place:
    """Of a process among them. The first, 0, leads."""

    rank: int
    size: int
    store: Path  # a file through which they find each other


def join(place: Place, device: torch.device) -> None:
    """Waits for the others."""
    os.environ["LOCAL_RANK"] = str(place.rank)  # by which transformers chooses the GPU, whatever started this process
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this host
    own = None
    if device.type == "cuda":
        own = torch.device("cuda", place.rank)
        torch.cuda.set_device(own)
    dist.init_process_group(
        "gloo" if own is None else "nccl",
        init_method=place.store.as_uri(),
        rank=place.rank,
        world_size=place.size,
        timeout=TIMEOUT,
        device_id=own,
    )


def leave() -> None:
    """From the process that leads, once the others have ended. NCCL wants all to leave together: there the end of the
    process does it."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def least(number: int, device: torch.device) -> int:
    """The least of the numbers that all of them have."""
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)
