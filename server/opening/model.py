"""Load a Hugging Face causal language model and its tokenizer, or say in one sentence why not."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from server.config import Settings
from server.errors import StartupError
from server.threads import usable_cores

log = logging.getLogger(__name__)
WEIGHTS_SHARE = 0.8  # of a device's free memory, at most, where there are several devices
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with what the server needs to know about it."""

    model: Any
    tokenizer: Any
    device: torch.device  # of its input, where it is spread
    eos: frozenset[int]
    context: int | None  # tokens that a sequence may have; None: no limit is known
    vocab: int  # rows of the input embedding


def load_model(settings: Settings) -> LoadedModel:
    """Raises StartupError with one sentence."""
    path = settings.model_path
    local = Path(path).is_dir()
    if not local and not settings.model:
        raise StartupError(
            f"There is no demo model at {path}: an installed package does not carry it, a clone of the repository "
            "does. Choose a model with --model ID_OR_PATH (or MATSTEER_MODEL)."
        )
    if not local and (Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise StartupError(f"There is no model folder {path!r} (--model or MATSTEER_MODEL).")
    device = _device(settings.device)
    _set_threads(settings.threads, device)
    if settings.log_level in ("warning", "error"):
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"local_files_only": local, "revision": settings.revision or "main"}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            # Only safetensors: a server has no reason to unpickle anything.
            path,
            dtype=_dtype(settings.dtype, device),
            use_safetensors=True,
            **_placement(settings.device, device),
            **options,
        )
    except Exception as error:  # transformers raises dozens of kinds, with pages of text
        log.debug("the model could not be loaded", exc_info=error)
        raise StartupError(f"The model {path!r} cannot be loaded: {_first_sentence(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise StartupError(f"The model {path!r} is an encoder-decoder; only decoder-only models can be served.")
    placed = getattr(model, "hf_device_map", {})
    if {"cpu", "disk"} & set(placed.values()) and device.type == "cuda":
        raise StartupError(f"The model {path!r} does not fit the {torch.cuda.device_count()} CUDA devices there are.")
    model = (model if placed else model.to(device)).eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=model.get_input_embeddings().weight.device,
        eos=_eos(model, tokenizer),
        context=_context(model, settings.max_context),
        vocab=model.get_input_embeddings().weight.shape[0],
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise StartupError(
                f"Bad setting device: {name!r}: this machine has {torch.cuda.device_count()} CUDA devices."
            )
    return torch.device(name)


def _placement(name: str, device: torch.device) -> dict[str, Any]:
    """Where accelerate puts the weights: on the first CUDA device and, for what does not fit there, the next ones, with
    room left on each for keys and values. Nothing to say for one device."""
    if name != "auto" or device.type != "cuda" or torch.cuda.device_count() < 2:
        return {}
    free = {index: int(torch.cuda.mem_get_info(index)[0] * WEIGHTS_SHARE) for index in range(torch.cuda.device_count())}
    return {"device_map": "sequential", "max_memory": free}


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def _set_threads(threads: int, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_num_threads(threads or usable_cores())


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """generation_config's end tokens (one or several), else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return frozenset(() if ids is None else ids if isinstance(ids, list | tuple) else (ids,))


def _context(model: Any, wanted: int | None) -> int | None:
    own = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limits = [limit for limit in (own, wanted) if isinstance(limit, int) and limit > 0]
    return min(limits, default=None)


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
