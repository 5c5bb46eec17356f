"""A causal language model and its tokenizer, opened from a folder or the Hugging Face hub: one way for `server` and
`training`, which may not import each other and both import `steering`.

Whatever hinders it is one ModelError, a sentence. A folder is looked at before anything is loaded. Safetensors and GGUF
files are read; pickles are not, since they can run code. Code that comes with a model runs only with
`trust_remote_code`, and nobody is asked.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from steering.errors import ModelError, first_line
from steering.files import mistaken_for
from steering.imports import importing, without_torch
from steering.known_models import located

if TYPE_CHECKING:  # to open a tokenizer takes no PyTorch
    import torch

log = logging.getLogger(__name__)

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GGUF = ".gguf"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
# What tokenizers are made of, as they are named by the libraries that write them.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "*.model", "tekken.json")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
TRUST = "--trust-remote-code (or MATSTEER_TRUST_REMOTE_CODE=true)"
MERGED = ("LORA",)  # kinds of adapters that are a change of weights, which can be added to them


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, and the base model that its `adapter_config.json` names."""

    id: str
    base: str
    folder: Path
    """Where its files are."""
    base_revision: str | None = None

    def __str__(self) -> str:
        """For clients: of folders the last name alone."""
        adapter, base = (Path(id).name if Path(id).is_dir() else id for id in (self.id, self.base))
        return f"{adapter} (LoRA, merged into {base})"


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model in evaluation mode, its weights frozen, and its tokenizer."""

    model: Any
    tokenizer: Any
    adapter: Adapter | None = None
    """What was merged into the weights."""


def open_pretrained(
    id: str,
    *,
    revision: str | None = None,
    device: "torch.device",
    dtype: "torch.dtype | str" = "auto",
    placement: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Pretrained:
    """Open a Hugging Face id or folder, a GGUF file or the name of a known model on `device`, or with a `placement`
    (`device_map`, `max_memory`) on several.

    `dtype` "auto" is the stored one. A folder or id of a LoRA adapter alone is its base model with the adapter merged
    into the weights, which needs the package peft. The quantized weights of a GGUF file are dequantized. Raises
    ModelError.
    """
    id = located(id)
    adapter = _adapter(id, revision)
    if adapter is None:
        config = _open_config(id, revision, trust_remote_code)
        _check_architecture(id, config, trust_remote_code)
        tokenizer = _open_tokenizer(id, revision, trust_remote_code)
        options = {"dtype": dtype, **(placement or {}), "trust_remote_code": trust_remote_code}
        return Pretrained(_open_weights(id, revision, config, device, options), tokenizer)
    peft = _peft(adapter)
    try:
        base = open_pretrained(
            adapter.base, revision=adapter.base_revision, device=device, dtype=dtype, placement=placement,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except ModelError as error:
        _refuse(id, f"it is a LoRA adapter, and this is wrong with its base model: {error}", error)
    model = _merged(peft, base.model, adapter)
    own = any(_matching(adapter.folder, TOKENIZERS))
    tokenizer = _open_tokenizer(str(adapter.folder), None, trust_remote_code) if own else base.tokenizer
    log.info("merged the LoRA adapter %s into the weights of %s", id, adapter.base)
    return Pretrained(model, tokenizer, adapter)


def open_config(id: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The config of what `open_pretrained` opens; of an adapter's, that of its base model. Raises ModelError."""
    id = located(id)
    if (adapter := _adapter(id, revision)) is not None:
        return open_config(adapter.base, revision=adapter.base_revision, trust_remote_code=trust_remote_code)
    return _open_config(id, revision, trust_remote_code)


def open_tokenizer(
    id: str, *, revision: str | None = None, trust_remote_code: bool = False, alone: bool = False
) -> Any:
    """The tokenizer of what `open_pretrained` opens. `alone`: transformers is to open nothing else in this process; it
    comes without PyTorch (`without_torch`) where the tokenizer takes none. Raises ModelError."""
    id = located(id)
    hides = alone and not trust_remote_code and not _is_of_gguf(id)
    with without_torch() if hides else nullcontext():
        if (adapter := _adapter(id, revision)) is None:
            return _open_tokenizer(id, revision, trust_remote_code)
        if any(_matching(adapter.folder, TOKENIZERS)):
            return _open_tokenizer(str(adapter.folder), None, trust_remote_code)
        if hides and _gguf_file(adapter.base) is not None:  # an adapter of the hub: nothing has said so before
            _refuse(
                id,
                f"its base model {adapter.base!r} is a GGUF file, whose tokenizer is read with PyTorch, and a process "
                "for HTTP has none; put the tokenizer's files beside the adapter, or serve with --engine-process false",
            )
        return open_tokenizer(adapter.base, revision=adapter.base_revision, trust_remote_code=trust_remote_code)


def check_shards(id: str, processes: int, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Raises ModelError where so many processes cannot hold together what `open_pretrained` opens."""
    from steering.sharding import why_not_sharded

    id = located(id)
    if _adapter(id, revision) is not None:
        why: str | None = "it is a LoRA adapter, which is merged into whole weights; save a merged model and name that"
    elif _gguf_file(id) is not None:
        why = "it is a GGUF file, which transformers reads whole"
    else:
        why = why_not_sharded(_open_config(id, revision, trust_remote_code), processes)
    if why:
        _refuse(id, f"tensor_parallel_size is {processes}, and {why}")


# --- what a folder holds --------------------------------------------------------------------------


def _adapter(id: str, revision: str | None) -> Adapter | None:
    """The adapter that this is, where it is one. Raises ModelError as `_look_at` does, and for one of an adapter."""
    try:
        found = _look_at(id, revision)
    except OSError as error:  # no permission, a name that is too long
        _refuse(id, f"{error.filename or id} cannot be read ({error.strerror})", error)
    if found is None:
        return None
    base = Path(found.base)
    if found.base == id or ((base / ADAPTER).is_file() and not _matching(base, (WEIGHTS, INDEX))):
        _refuse(id, f"its base model {found.base!r} is an adapter itself; merge that one into its own base model first")
    return found


def _look_at(id: str, revision: str | None) -> Adapter | None:
    """The adapter that this is, where it is one. Raises ModelError for a folder that holds no model, for files that are
    not what they are called, and for an adapter beside other weights."""
    folder = Path(id)
    if not id:
        raise ModelError("No model is named: give a Hugging Face id or a folder.")
    if folder.is_dir():
        _check_files(id, folder)
        adapter = path if (path := folder / ADAPTER).is_file() else None
        beside = bool(_matching(folder, (WEIGHTS, INDEX, *PICKLES)))
    elif folder.is_file():
        _check_file(id, folder)
        return None
    elif folder.is_absolute() or id.startswith((".", "~")) or id.count("/") > 1:
        raise ModelError(f"There is no model folder {id!r}.")
    else:
        adapter = _hub_file(id, ADAPTER, revision)
        beside = adapter is not None and _hub_file(id, CONFIG, revision) is not None
    if adapter is None:
        if folder.is_dir():
            _check_model_folder(id, folder)
        return None
    if beside:
        _refuse(
            id,
            f"a LoRA adapter ({ADAPTER}) lies beside the weights of a model, and which of them is meant is not clear; "
            "move the adapter's files into a folder of their own and name that, or delete them",
        )
    said = _json_object(id, adapter)
    base = said.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        _refuse(id, f"{ADAPTER} does not name the adapter's base model (base_model_name_or_path)")
    if (kind := said.get("peft_type")) not in MERGED:
        _refuse(id, f"it is an adapter of the type {kind}; only {', '.join(MERGED)} can be merged into weights")
    if not folder.is_dir() and (weights := _hub_file(id, ADAPTER_WEIGHTS, revision)):
        folder = weights.parent
    if not (folder / ADAPTER_WEIGHTS).is_file():
        _refuse(id, f"the adapter's weights, {ADAPTER_WEIGHTS}, are missing (pickles are not read)")
    return Adapter(id, base, folder, said.get("revision"))


def _hub_file(id: str, name: str, revision: str | None) -> Path | None:
    """A file of the hub; None where there is none, or the hub cannot be asked."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            id, name, revision=revision or "main",
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # opening the config says what is wrong
        return None
    return Path(found) if found else None


def _check_files(id: str, folder: Path) -> None:
    """Files that are not what they are called. Raises ModelError."""
    if not any(folder.iterdir()):
        _refuse(id, "the folder is empty")
    for path in _matching(folder, SMALL_FILES):
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            _refuse(id, f"{path.name} cannot be read ({error.strerror})")
        if what := mistaken_for(path):
            _refuse(id, f"{path.name} is {what}")


def _check_model_folder(id: str, folder: Path) -> None:
    """Raises ModelError where the config is missing or broken."""
    if not (folder / CONFIG).is_file():
        if files := sorted(path.name for path in _matching(folder, ("*.gguf",))):
            if len(files) > 1:
                _refuse(id, f"it holds several GGUF files; name one of {', '.join(files)}")
            _check_file(id, folder / files[0])
            return
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        _refuse(id, f"there is no {CONFIG} in it" + (f", but in {folder / inside[0]}" if inside else ""))
    config = _json_object(id, folder / CONFIG)
    if "model_type" not in config:
        _refuse(id, f"its {CONFIG} has no model_type, so that nothing says which architecture it is")


def _check_weights(id: str, folder: Path) -> None:
    """Raises ModelError where weights are missing, pickled or cut off."""
    names = [WEIGHTS] if (folder / WEIGHTS).is_file() else []
    if not names and (folder / INDEX).is_file():
        shards = _json_object(id, folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            _refuse(id, f"{INDEX} does not say in which files the weights are (weight_map)")
        names = sorted(set(shards.values()))
    if not names:
        if pickled := sorted(path.name for path in _matching(folder, PICKLES)):
            _refuse(
                id,
                f"its weights are pickled ({pickled[0]}), and pickles can run code when they are read; have "
                "transformers write them as safetensors (save_pretrained), or take a revision that has them",
            )
        _refuse(id, f"there are no weights in it (neither {WEIGHTS} nor {INDEX})")
    for name in names:
        if not (folder / name).is_file():
            _refuse(id, f"{name} is missing, which {INDEX} names")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            _refuse(id, f"{name} is broken or was cut off ({first_line(error)}); copy or download it again")


def _check_tokenizer(id: str, folder: Path) -> None:
    """Raises ModelError where the files of a tokenizer are missing."""
    if not any(_matching(folder, TOKENIZERS)):
        _refuse(
            id, "there is no tokenizer in it; copy tokenizer.json and tokenizer_config.json of its base model there"
        )


def _check_file(id: str, path: Path) -> None:
    """Raises ModelError for all but a GGUF file that can be read."""
    if path.suffix == ".safetensors":
        _refuse(id, f"it is a file of weights; name the folder that it lies in, {path.parent}")
    if path.suffix != GGUF:
        _refuse(id, "it is a file, not a model's folder")
    if what := mistaken_for(path):
        _refuse(id, f"{path.name} is {what}")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        _refuse(id, "it is one part of several of a GGUF file; llama.cpp's `llama-gguf-split --merge` joins them")
    if importlib.util.find_spec("gguf") is None:
        _refuse(id, "it is a GGUF file, and reading it needs the package gguf (extra `gguf`): pip install gguf")


def _gguf_file(id: str) -> Path | None:
    """The GGUF file that this is, or that is alone in this folder without a config beside it."""
    path = Path(id)
    if path.is_file():
        return path
    if not path.is_dir() or (path / CONFIG).is_file():
        return None
    return next(iter(_matching(path, ("*.gguf",))), None)


def _is_of_gguf(id: str) -> bool:
    """Whether a tokenizer comes from a GGUF file, which transformers reads with PyTorch."""
    adapter = _adapter(id, None) if Path(id).is_dir() else None
    return _gguf_file(adapter.base if adapter else id) is not None


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def _json_object(id: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        _refuse(id, f"{path.name} is not valid JSON ({first_line(error)})")
    if not isinstance(found, dict):
        _refuse(id, f"{path.name} must hold a JSON object, not a {type(found).__name__}")
    return found


# --- what transformers and peft make of it --------------------------------------------------------


def _open_config(id: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(**_where(id, revision), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises dozens of kinds, with pages of text
        _refuse_as(id, error)
    return config


def _check_architecture(id: str, config: Any, trust_remote_code: bool) -> None:
    """Raises ModelError for a model that is no causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        _refuse(id, "it is an encoder-decoder; only decoder-only models can be steered")
    own = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own:
        _refuse(id, f"its type, {config.model_type}, is no causal language model of transformers")


def _open_tokenizer(id: str, revision: str | None, trust_remote_code: bool) -> Any:
    with importing():
        from transformers import AutoTokenizer

    if Path(id).is_dir() and _gguf_file(id) is None:
        _check_tokenizer(id, Path(id))
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_where(id, revision), trust_remote_code=trust_remote_code)
    except Exception as error:
        _refuse_as(id, error, "its tokenizer cannot be opened: ")
    return tokenizer


def _open_weights(
    id: str, revision: str | None, config: Any, device: "torch.device", options: Mapping[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM

    gguf = _gguf_file(id)
    if Path(id).is_dir() and gguf is None:
        _check_weights(id, Path(id))
    quantized = getattr(config, "quantization_config", None)
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            **_where(id, revision), use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
        model, found = opened
        if gguf is not None:
            _forget_quantization(model)
            log.info("%s: its quantized weights, if any, were dequantized to %s", gguf.name, _dtype_name(model))
        model = (model if getattr(model, "hf_device_map", None) else model.to(device)).eval().requires_grad_(False)
    except Exception as error:
        _refuse_as(id, error, f"its weights are quantized ({_method(quantized)}): " if quantized else "")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        _refuse(id, f"{name} is {_shape(stored)} in its files and {_shape(wanted)} by its {CONFIG}")
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        _refuse(id, f"its files lack weights that the architecture has ({missing[0]}{more}); random ones are no use")
    return model


def _forget_quantization(model: Any) -> None:
    """What transformers keeps of a GGUF file although the weights are plain tensors, and which forbids to save them."""
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _method(quantized: Any) -> str:
    found = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    return str(getattr(found, "value", found))


def _peft(adapter: Adapter) -> Any:
    try:
        import peft
    except ImportError:
        _refuse(
            adapter.id,
            f"it is a LoRA adapter for {adapter.base}, and merging it needs the package peft (extra `lora`): "
            "pip install peft",
        )
    return peft


def _merged(peft: Any, model: Any, adapter: Adapter) -> Any:
    """The model with the adapter's changes in its weights."""
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()
        return merged.eval().requires_grad_(False)
    except Exception as error:
        _refuse_as(adapter.id, error, "the adapter cannot be merged: ")


def _where(id: str, revision: str | None) -> dict[str, Any]:
    """What is opened, as arguments of transformers' `from_pretrained`."""
    if (gguf := _gguf_file(id)) is not None:
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        return {**place, "local_files_only": True}
    where = {"local_files_only": True} if Path(id).is_dir() else {"revision": revision or "main"}
    return {"pretrained_model_name_or_path": id, **where}


def _refuse_as(id: str, error: Exception, what: str = "") -> NoReturn:
    """Another library's error as one sentence; all of it goes to the log at level debug."""
    log.debug("the model %s could not be opened", id, exc_info=error)
    if "trust_remote_code" in str(error):
        _refuse(id, f"it comes with code of its own, which is run only with {TRUST}; read that code first", error)
    named = isinstance(error, OSError | ValueError | ImportError | RuntimeError)  # others say little by themselves
    _refuse(id, what + ("" if named else f"{type(error).__name__} ") + first_line(error), error)


def _refuse(id: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise ModelError(f"The model {id!r} cannot be loaded: {why.rstrip('.')}.") from cause
