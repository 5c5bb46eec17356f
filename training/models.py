"""The base model on the device that was chosen, or its config alone; opened by `steering.pretrained`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering.chat_template import ChatTemplate, open_chat_template, read_chat_template
from steering.errors import ModelError, TextError
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
    chat: ChatTemplate | None = None
    """None: its tokenizer has no chat template."""


def load_base(
    id: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    chat_template: Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Base:
    """Load a Hugging Face id or folder.

    `device` "auto" is CUDA where there is one, and of several processes each takes a device of its own; `dtype` "auto"
    is the stored one, but float32 on a CPU. `chat_template`: a file with another one than the tokenizer's own;
    `chat_template_kwargs`: variables that it renders every conversation with. Raises TrainingError.
    """
    import torch
    from transformers.utils import logging

    from steering.pretrained import open_pretrained

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
    try:
        source = read_chat_template(chat_template) if chat_template else None
        opened = open_pretrained(id, revision=revision, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
        if source is not None:
            opened.tokenizer.chat_template = source
        chat = open_chat_template(opened.tokenizer)
        if chat is not None:
            chat.file = chat_template.name if chat_template else None
            chat.check_variables(chat_template_kwargs or {})
            chat.variables = chat_template_kwargs or {}
        elif chat_template_kwargs:
            raise TrainingError("--chat-template-kwargs is for a chat template, and the model's tokenizer has none.")
    except ModelError as error:
        raise TrainingError(str(error)) from error
    except TextError as error:
        raise TrainingError(error.sentence) from error
    return Base(opened.model, opened.tokenizer, id, revision, chat)


def _own(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise TrainingError(f"device must be auto, cpu or cuda where several processes run, got {device!r}.")
    own = own_device(cpu=device == "cpu")
    if device == "cuda" and own == "cpu":
        raise TrainingError("device is 'cuda', but there is no CUDA device for this process.")
    return own


def load_config(id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The config of a Hugging Face id or folder. Raises TrainingError."""
    from steering.pretrained import open_config

    try:
        return open_config(id, revision=revision, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise TrainingError(str(error)) from error


def stored_dtype(id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> str:
    """The dtype of a model's weights, as in "bfloat16"; float32 where its config does not say. Raises TrainingError."""
    config = load_config(id, revision, trust_remote_code=trust_remote_code)
    return str(config.dtype or "float32").removeprefix("torch.")
