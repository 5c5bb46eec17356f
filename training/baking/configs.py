"""A base model's config, without its weights."""

from typing import Any

from training.errors import TrainingError


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
