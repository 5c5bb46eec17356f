"""What an interrupted fit goes on from: one safetensors file, replaced as a whole."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.errors import FitError

SECONDS = 2.0  # between two that are written

State = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and metadata."""


class Pace:
    """Whether it is time to write the next one."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        if (now := time.monotonic()) - self._last < SECONDS:
            return False
        self._last = now
        return True


def read_state(path: Path, key: str) -> State | None:
    """None where there is none. Raises FitError for another fit's, whose metadata have another `key`, and for a broken
    file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FitError(f"{path} cannot be read: {error}.") from None
    if metadata.get("key") != key:
        raise FitError(f"{path.parent} holds a fit with other settings or data: choose another folder or delete it.")
    return tensors, metadata


def with_moments(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters by their names, and what the optimizer knows of each."""
    tensors = {name: value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for moment, tensor in optimizer.state.get(value, {}).items():
            tensors[f"adam.{name}.{moment}"] = tensor
    return tensors


@torch.no_grad()
def put_back(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """The inverse, in place."""
    for name, value in parameters.items():
        value.copy_(tensors[name])
        moments = {key.rpartition(".")[2]: one for key, one in tensors.items() if key.startswith(f"adam.{name}.")}
        if moments:
            optimizer.state[value] = {moment: tensor.to(value.device) for moment, tensor in moments.items()}
