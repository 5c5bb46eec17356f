"""What the launches of all kernels share."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTERPRETED_PROCESSORS = 1  # what a CPU, where kernels are interpreted, counts as
SHARED_MEMORY = 96 * 1024


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which is another where a model is spread over several."""
    here = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use, so that two fit a processor where it has much."""
    if device.type != "cuda":
        return SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    most = int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
    return most // 2 if most > SHARED_MEMORY * 3 // 2 else most


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension without gaps."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check(right: bool, op: str, what: str) -> None:
    """Raises RuntimeError, as the kernels for CPUs do."""
    if not right:
        raise RuntimeError(f"{op}: {what}")
