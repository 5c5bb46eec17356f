"""Whether the engine can serve a model, found out by trying: its attention is replaced, and has to say the same."""

import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.engine.attention import NAME
from server.engine.extents import SMALLEST
from server.engine.forward import Forward
from server.engine.tape import Tape, Work
from server.engine.types import Steer
from server.errors import StartupError
from server.layers.exchange import exchange_layers
from steering.columns import ColumnBank

log = logging.getLogger(__name__)
# How far the logits may be from the model's own, as a share of their norm.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
TRIED = (24, 9)  # tokens of the texts that it is tried on, packed into one pass
CGROUP = Path("/sys/fs/cgroup")
BOUND_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that change for all tokens when a text grows long


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


def text_limit(model: Any, limit: int | None) -> int | None:
    """How many tokens a text may have, at most `limit`."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in parameters.values() if all(isinstance(one, dict) for one in parameters.values()) else [parameters]:
        if isinstance(rope, dict) and rope.get("rope_type") in BOUND_BY_LENGTH:
            own = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            own = own or config.max_position_embeddings
            limit = own if limit is None else min(limit, own)
    return limit


def cache_size(forward: Forward, *, limit: int | None, rows: int, mib: int) -> tuple[int, int]:
    """The largest extent, in tokens, and how many such extents there are, for `mib` of memory (0: by what is free).

    Raises StartupError where not even two short texts fit.
    """
    token = forward.attention.token_bytes
    tokens = mib * 2**20 // token if mib else _free_tokens(forward)
    # Two texts at least, so that a steered one can be compared with its twin.
    largest = _halvable(limit, up=True) if limit else tokens
    if largest > tokens // 2:
        largest = _halvable(tokens // 2, up=False)
    if largest < SMALLEST:
        raise StartupError(
            f"There is no memory for keys and values: a token takes {token} bytes, and {tokens * token} are to be had "
            "(MATSTEER_CACHE_MIB)."
        )
    if limit and largest < limit:
        log.warning("texts may have %d tokens, not %d: there is no memory for more", largest, limit)
    # More than twice what the rows can use would serve repeated prompts only.
    return largest, min(tokens // largest, 2 * rows)


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


def _free_tokens(forward: Forward) -> int:
    """How many tokens' keys and values fit into what the cache may take of every device that has layers."""
    sizes: Counter[torch.device] = Counter()
    for shape in forward.attention.shapes.values():
        sizes[shape.device] += shape.bytes
    return min(_free_bytes(device) // size for device, size in sizes.items())


def _free_bytes(device: torch.device) -> int:
    """What the cache may take of the memory that is free: nine tenths on a GPU, a quarter elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    known = "SC_AVPHYS_PAGES" in os.sysconf_names  # macOS tells only how much there is
    pages = os.sysconf("SC_AVPHYS_PAGES") if known else os.sysconf("SC_PHYS_PAGES") // 2
    return min(pages * os.sysconf("SC_PAGE_SIZE"), _container_bytes()) // 4


def _container_bytes() -> int:
    """What is left of a container's own limit (cgroup v2)."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return sys.maxsize
    return max(0, int(limit) - int(used)) if limit != "max" else sys.maxsize


def _halvable(tokens: int, *, up: bool) -> int:
    """The next number that can be halved down to pieces of 16 to 31 tokens."""
    unit = 1
    while tokens // (unit * 2) >= SMALLEST:
        unit *= 2
    return (-(-tokens // unit) if up else tokens // unit) * unit
