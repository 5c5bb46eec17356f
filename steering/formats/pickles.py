"""PyTorch's own files: tensors and plain values out of a pickle, never code."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.errors import FormatError, first_line
from steering.files import mistaken_for

# How torch.load names what it does not make.
_REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed global|Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)")


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote. Raises FormatError for anything that only unpickling code would read."""
    refuse_mistaken(path)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of protocols that it may not know
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(_not_plain(path, str(error))) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {first_line(error)}") from None
    except (KeyError, IndexError, AttributeError):  # what no pickle holds
        raise FormatError(f"{path} is no sound file of PyTorch's") from None


def refuse_mistaken(path: Path) -> None:
    """Raises FormatError for a file that is something else altogether, and says what."""
    if what := mistaken_for(path):
        raise FormatError(f"{path} is {what}")


def vector_of(value: object, what: str) -> Tensor:
    """A tensor of shape [D], or [1, .., D], as float32 [D]. Raises FormatError."""
    if not isinstance(value, Tensor) or value.numel() == 0 or value.numel() != value.shape[-1:].numel():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise FormatError(f"{what} must be a vector, not {shape}")
    return value.detach().float().reshape(-1)


def _not_plain(path: Path, said: str) -> str:
    sentence = f"{path} is no file of tensors and plain values: anything else in a pickle is code, and is not run"
    found = _REFUSED.search(said)
    if found is None:
        return sentence
    name = found[1] or found[2]
    advice = "save its vectors as a dict of layer -> tensor"
    if name.startswith("numpy"):
        advice = "save its arrays as tensors, or with numpy.savez"
    elif name.startswith("repeng"):
        advice = "write it with its export_gguf"
    return f"{sentence}; it asks for {name}: {advice}"
