"""Loading the base model, or its config alone, with errors that a user can act on."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.distributed import launched, own_device
from training.errors import TrainingError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded causal language model with its tokenizer, and where it came from."""

    model: Any
    tokenizer: Any
    id: str
    revision: str | None


def load_base(id: str, *, revision: str | None = None, device: str = "auto", dtype: str = "auto") -> Base:
    """Load a Hugging Face id or folder. `device` "auto" is CUDA where there is one, and of several processes each takes
    a device of its own; `dtype` "auto" is the stored one, but float32 on a CPU. Raises TrainingError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from steering.files import model_folder_problem

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    if launched():
        device = _own(device)
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise TrainingError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise TrainingError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}.") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError(f"device is {device!r}, but there is no CUDA device.")
    if Path(id).is_dir() and (problem := model_folder_problem(Path(id))):
        raise TrainingError(f"The model {id!r} cannot be loaded: {problem}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(id, revision=revision)
        model: Any = AutoModelForCausalLM.from_pretrained(id, revision=revision, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"The model {id!r} cannot be loaded: {reason[0]}") from None
    return Base(model.to(place).eval(), tokenizer, id, revision)


def _own(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(f"device must be auto, cpu or cuda where several processes run, got {device!r}.")
    own = own_device(cpu=device == "cpu")
    if device == "cuda" and own == "cpu":
        raise TrainingError("device is 'cuda', but there is no CUDA device for this process.")
    return own


def load_config(id: str, revision: str | None = None) -> Any:
    """The config of a Hugging Face id or folder. Raises TrainingError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(id, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(f"The config of {id!r} cannot be loaded: {reason[0]}") from None


def stored_dtype(id: str, revision: str | None = None) -> str:
    """The dtype of a model's weights, as in "bfloat16"; float32 where its config does not say. Raises TrainingError."""
    return str(load_config(id, revision).dtype or "float32").removeprefix("torch.")
