"""What a fit needs to continue where it stopped: one safetensors file, replaced as a whole, and the log beside it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.activations.store import Contrast
from training.errors import FitError
from training.files import write_bytes, write_tensors
from training.methods.mat_config import MatConfig
from training.methods.mat_log import Epoch
from training.methods.mat_model import Model

_PARTS = ("vectors", "weights", "biases")


def fit_key(train: Mapping[str, Contrast], dev: Mapping[str, Contrast] | None, config: MatConfig) -> str:
    """A hash of everything that decides the result."""
    digest = hashlib.sha256(json.dumps(config.as_dict(), sort_keys=True).encode())
    for part in (train, dev or {}):
        for name, contrast in part.items():
            digest.update(name.encode())
            for side in (contrast.positive, contrast.negative):
                digest.update(str(tuple(side.shape)).encode())
                digest.update(side.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_state(
    folder: Path, key: str, model: Model, optimizer: torch.optim.Optimizer, best: list[Tensor], history: list[Epoch]
) -> None:
    """The log first: a state never names an epoch that the log lacks."""
    write_bytes(folder / "log.jsonl", "".join(epoch.line() + "\n" for epoch in history).encode())
    tensors = dict(zip(_PARTS, model.parameters(), strict=True))
    tensors |= {f"best.{name}": value for name, value in zip(_PARTS, best, strict=True)}
    for name, value in zip(_PARTS, model.parameters(), strict=True):
        for moment, tensor in optimizer.state.get(value, {}).items():
            tensors[f"adam.{name}.{moment}"] = tensor
    write_tensors(folder / "state.safetensors", tensors, {"key": key, "epochs": str(len(history))})


def load_state(
    folder: Path, key: str, model: Model, optimizer: torch.optim.Optimizer
) -> tuple[list[Tensor], list[Epoch]] | None:
    """Put the stored state into model and optimizer; None where there is none. Raises FitError for another fit's."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FitError(f"{path} cannot be read: {error}.") from None
    if metadata.get("key") != key:
        raise FitError(f"{folder} holds a fit with other settings or data: choose another folder or delete it.")
    for name, value in zip(_PARTS, model.parameters(), strict=True):
        value.copy_(tensors[name])
        moments = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{name}.")}
        if moments:
            optimizer.state[value] = {moment: tensor.to(value.device) for moment, tensor in moments.items()}
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[: int(metadata["epochs"])]
    best = [tensors[f"best.{name}"].to(model.vectors.device) for name in _PARTS]
    return best, [Epoch.parse(line) for line in lines]
