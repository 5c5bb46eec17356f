"""Whether the engine can serve a model, found out by trying: its attention is replaced, and has to say the same."""

import logging
from typing import Any

import torch
from torch import Tensor

from server.attention.interface import NAME
from server.engine.forward import Forward
from server.engine.tape import Tape, Work
from server.engine.types import Steer
from server.errors import StartupError
from steer_ops.layers import exchange_layers
from steering.columns import ColumnBank

log = logging.getLogger(__name__)
# How far the logits may be from the model's own, as a share of their norm.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
TRIED = (24, 9)  # tokens of the texts that it is tried on, packed into one pass


def open_forward(model: Any, bank: ColumnBank, name: str, *, native: bool = True) -> Forward:
    """The model with the engine's attention in place of its own, and on a CPU with faster layers. `native`: by kernels
    that are compiled for it, where they can be had.

    Raises StartupError where that is not the same model any more.
    """
    texts = _texts(model)
    with torch.inference_mode():
        own = [model(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    exchange_layers(model, native=native)
    try:
        forward = Forward(model, bank, native=native)
        works = [_work(text) for text in texts]
        logits, _ = forward(works, list(range(sum(TRIED))))
    except Exception as error:
        log.debug("the engine's attention fails", exc_info=error)
        raise StartupError(_refusal(name, model, f"its attention cannot be replaced ({error})")) from error
    if not forward.attention.shapes:
        raise StartupError(_refusal(name, model, f"it does not call the attention that is registered as {NAME!r}"))
    _check_layers(model, forward, name)
    for mine, theirs in zip(torch.split(logits, list(TRIED)), own, strict=True):
        away = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        if not away <= TOLERANCES.get(theirs.dtype, 1e-3):
            raise StartupError(
                _refusal(name, model, f"with the engine's attention its logits are {away:.2g} away from its own")
            )
    return forward


def _texts(model: Any) -> list[Tensor]:
    vocab = model.get_input_embeddings().weight.shape[0]
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab, (length,), generator=random).to(model.device) for length in TRIED]


def _work(text: Tensor) -> Work:
    return Work(Tape(text.tolist(), len(text), Steer()), 0, len(text))


def _check_layers(model: Any, forward: Forward, name: str) -> None:
    """Kinds of layers that a short text cannot tell from others."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise StartupError(_refusal(name, model, f"it has layers of a kind that keeps another state: {unknown[0]}"))
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    if sliding - forward.attention.windowed:
        raise StartupError(_refusal(name, model, "it does not tell its attention how far its layers look back"))


def _refusal(name: str, model: Any, why: str) -> str:
    return f"The model {name!r} ({type(model).__name__}) cannot be served: {why}."
