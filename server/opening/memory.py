"""How long texts may become, and how much memory their keys and values get."""

import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from server.engine.extents import SMALLEST
from server.engine.forward import Forward
from server.errors import StartupError

log = logging.getLogger(__name__)
CGROUP = Path("/sys/fs/cgroup")
BOUND_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that change for all tokens when a text grows long


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
