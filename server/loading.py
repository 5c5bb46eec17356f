"""From a model on disk to one that the engine can run: loaded, and checked."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging as hf_logging

from server.attention.backend import NAME
from server.engine.compute_threads import use_device
from server.engine.model_runner import ModelRunner
from server.engine.sequence import ScheduledChunk, Sequence
from server.errors import StartupError, is_out_of_memory
from server.threads import usable_cores
from steer_ops.layers import exchange_layers
from steering.bank import ColumnBank
from steering.errors import ModelError
from steering.pretrained import Adapter, check_shards, open_pretrained
from steering.sharding import use_plain_layers

if TYPE_CHECKING:  # an engine without a server needs no pydantic
    from server.config import Settings

log = logging.getLogger(__name__)
WEIGHTS_SHARE = 0.8  # of a device's free memory, at most, where there are several devices
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AMPERE = 8, 0  # the compute capability from which on GPUs compute in bfloat16
# How far the logits may be from the model's own, as a share of their norm.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
CHECKED = (24, 9)  # tokens of the texts that a model is checked on, packed into one pass
BOUND_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that change for all tokens when a text grows long


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with what the server needs to know about it."""

    model: Any
    tokenizer: Any
    device: torch.device  # of its input, where it is spread
    eos: frozenset[int]
    max_model_len: int | None  # tokens that a text may have; None: no limit is known
    vocab: int  # rows of the input embedding
    adapter: Adapter | None = None  # the LoRA adapter that was merged into the weights


def load_model(settings: "Settings") -> LoadedModel:
    """Raises StartupError with one sentence."""
    path = settings.model_path
    local = Path(path).is_dir()
    if not local and not settings.model:
        raise StartupError(
            f"There is no demo model at {path}, where a clone of the repository and a wheel have it. Choose a model "
            "with --model ID_OR_PATH (or MATSTEER_MODEL)."
        )
    device = choose_device(settings)
    _set_threads(settings, device)
    if settings.log_level in ("warning", "error"):
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        opened = open_pretrained(
            path,
            revision=settings.revision,
            device=device,
            dtype=_dtype(settings.dtype, device),
            placement=_placement(settings, device),
            trust_remote_code=settings.trust_remote_code,
        )
    except ModelError as error:
        raise StartupError(str(error)) from error
    model, tokenizer = opened.model, opened.tokenizer
    placed = getattr(model, "hf_device_map", {})
    if {"cpu", "disk"} & set(placed.values()) and device.type == "cuda":
        raise StartupError(f"The model {path!r} does not fit the {torch.cuda.device_count()} CUDA devices there are.")
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=model.get_input_embeddings().weight.device,
        eos=_eos(model, tokenizer),
        max_model_len=max_model_len(model, settings.max_model_len),
        vocab=model.get_input_embeddings().weight.shape[0],
        adapter=opened.adapter,
    )


def choose_device(settings: "Settings") -> torch.device:
    """Raises StartupError where it is not there."""
    name = settings.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise StartupError(
                f"Bad setting device: {name!r}: this machine has {torch.cuda.device_count()} CUDA devices."
            )
    return torch.device(name)


def check_tensor_parallel(settings: "Settings") -> None:
    """Raises StartupError where the model cannot be in `tensor_parallel_size` processes here."""
    size, device = settings.tensor_parallel_size, choose_device(settings)
    if not torch.distributed.is_available():
        raise StartupError(f"Bad setting tensor_parallel_size: {size}: this build of PyTorch has no torch.distributed.")
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise StartupError(
            f"Bad setting tensor_parallel_size: {size}: this machine has {torch.cuda.device_count()} CUDA devices, and "
            "each process needs one."
        )
    if device.type == "cpu" and torch.cuda.is_available():  # transformers would take them
        raise StartupError(
            f"Bad setting tensor_parallel_size: {size}: with device cpu the GPUs of this machine have to be hidden "
            "(CUDA_VISIBLE_DEVICES=)."
        )
    try:
        check_shards(
            settings.model_path, size, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except ModelError as error:
        raise StartupError(str(error)) from error


def _placement(settings: "Settings", device: torch.device) -> dict[str, Any]:
    """Where the weights go: of each process of several its shard of them to its own device; else where accelerate puts
    them, on the first CUDA device and, for what does not fit there, the next ones, with room left on each for keys and
    values. Nothing to say for one device."""
    if settings.tensor_parallel_size > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=settings.tensor_parallel_size)}
    if settings.device != "auto" or device.type != "cuda" or torch.cuda.device_count() < 2:
        return {}
    free = {index: int(torch.cuda.mem_get_info(index)[0] * WEIGHTS_SHARE) for index in range(torch.cuda.device_count())}
    return {"device_map": "sequential", "max_memory": free}


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.get_device_capability(device) >= AMPERE:
        return torch.bfloat16
    log.info("%s computes in float16: it has no bfloat16", torch.cuda.get_device_name(device))
    return torch.float16


def _set_threads(settings: "Settings", device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_num_threads(settings.threads or max(1, usable_cores() // settings.tensor_parallel_size))


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """generation_config's end tokens (one or several), else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return frozenset(() if ids is None else ids if isinstance(ids, list | tuple) else (ids,))


def max_model_len(model: Any, wanted: int | None = None) -> int | None:
    """How many tokens a text may have, prompt and answer together: as wanted, and as the model was made for."""
    config = model.config.get_text_config(decoder=True)
    limits = [wanted, getattr(config, "max_position_embeddings", None)]
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in parameters.values() if all(isinstance(one, dict) for one in parameters.values()) else [parameters]:
        if isinstance(rope, dict) and rope.get("rope_type") in BOUND_BY_LENGTH:
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


# --- self-check -----------------------------------------------------------------------------------


def open_runner(model: Any, bank: ColumnBank, name: str, *, native: bool = True) -> ModelRunner:
    """The model with the engine's attention in place of its own, and with faster layers; checked on two texts.
    `native`: by kernels that are compiled for its device, where they can be had.

    Raises StartupError where that is not the same model any more.
    """
    use_device(bank.device)
    texts = _random_texts(model)
    with torch.inference_mode():
        own = [model(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    use_plain_layers(model)
    exchange_layers(model, native=native)
    try:
        runner = ModelRunner(model, bank, native=native)
        # Every token's logits: as if all that follows the first one were to be scored.
        given = [
            Sequence("check", 0, (ids[0],), continuation=(*ids[1:], 0)) for ids in (text.tolist() for text in texts)
        ]
        logits, _ = runner.forward(tuple(ScheduledChunk(one, 0, len(one.token_ids)) for one in given))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.debug("the engine's attention fails", exc_info=error)
        raise StartupError(_refusal(name, model, f"its attention cannot be replaced ({error})")) from error
    if not runner.attention.shapes:
        raise StartupError(_refusal(name, model, f"it does not call the attention that is registered as {NAME!r}"))
    _check_layers(model, runner, name)
    for mine, theirs in zip(torch.split(logits, list(CHECKED)), own, strict=True):
        away = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        if not away <= TOLERANCES.get(theirs.dtype, 1e-3):
            raise StartupError(
                _refusal(name, model, f"with the engine's attention its logits are {away:.2g} away from its own")
            )
    return runner


def _random_texts(model: Any) -> list[Tensor]:
    vocab = model.get_input_embeddings().weight.shape[0]
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (length,), generator=random).to(model.device) for length in CHECKED]


def _check_layers(model: Any, runner: ModelRunner, name: str) -> None:
    """Refuses what the check on a short text cannot expose: layers that keep another state than keys and values, and
    sliding windows that are not passed on to the attention."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise StartupError(_refusal(name, model, f"it has layers of a kind that keeps another state: {unknown[0]}"))
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    if sliding - runner.attention.windowed:
        raise StartupError(_refusal(name, model, "it does not tell its attention how far its layers look back"))


def _refusal(name: str, model: Any, why: str) -> str:
    return f"The model {name!r} ({type(model).__name__}) cannot be served: {why}."
