"""A forward pass in two parts: what comes before the first steered site is the same in every arm."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steering.column import Column
from steering.sites import layers
from steering.types import SiteKind


def last_alike(columns: Sequence[Column], multipliers: Sequence[Sequence[float]]) -> int:
    """The last block that no row steers in or before, nor reads for a gate; -1: there is none. multipliers [rows,
    columns]."""
    acting = [column for number, column in enumerate(columns) if any(row[number] for row in multipliers)]
    sites = [site for one in acting for site in (one.site, *([one.reads.site] if one.reads else ()))]
    # What is done to a block's output is done after the block.
    return min((site.layer - (site.kind is not SiteKind.RESIDUAL) for site in sites), default=-1)


def first_part(model: nn.Module, last: int, run: Callable[[], object]) -> Any:
    """The output of block `last` in the pass that `run` makes, whose later blocks compute nothing."""
    blocks, found = layers(model), []
    hook = blocks[last].register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        with _silent(blocks[last + 1 :], lambda: found[0]):
            run()
    finally:
        hook.remove()
    return found[0]


@contextmanager
def second_part(model: nn.Module, last: int, output: Any, rows: Sequence[int]) -> Iterator[None]:
    """Inside, the pass begins behind block `last` with these `rows` of its `output`; hooks on it run as ever."""
    index = torch.tensor(rows, device=_hidden(output).device)
    hidden = _hidden(output)[index]
    repeated = hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))
    with _silent(layers(model)[: last + 1], lambda: repeated):
        yield


def _hidden(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@contextmanager
def _silent(blocks: Sequence[nn.Module], output: Callable[[], Any]) -> Iterator[None]:
    """Inside, these blocks compute nothing and give `output()`."""
    own = [vars(block).get("forward") for block in blocks]  # accelerate has put one there, if anybody
    for block in blocks:
        vars(block)["forward"] = lambda *_, **__: output()
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = before
