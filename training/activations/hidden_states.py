"""Hidden states of a Hugging Face model at chosen sites and positions: one forward pass, left after the last site."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from steering.sites import site_module
from steering.types import Site
from training.activations.tokens import Encoded
from training.choices import Pool

Take = Callable[[Tensor], Tensor]


def span(row: Encoded, pool: Pool) -> range:
    """The positions of a sample that count."""
    if pool is Pool.LAST:
        return range(row.end, row.end + 1)
    if pool is Pool.FIRST:
        return range(row.start, row.start + 1)
    return range(row.start, max(row.end, row.start + 1))


@dataclass(frozen=True, eq=False)
class Wanted:
    """The positions of a batch of B samples that count, and the share of each in its sample's row. Samples with fewer
    than W of them have repetitions with a share of 0."""

    index: Tensor  # int64 [B, W]
    share: Tensor  # float32 [B, W]
    pool: Pool

    @classmethod
    def of(cls, rows: Sequence[Encoded], pool: Pool, device: torch.device) -> Self:
        spans = [span(row, pool) for row in rows]
        width = max(map(len, spans))
        index = [[*own, *[own[-1]] * (width - len(own))] for own in spans]
        share = [[1 / len(own)] * len(own) + [0.0] * (width - len(own)) for own in spans]
        return cls(torch.tensor(index, device=device), torch.tensor(share, device=device), pool)

    def take(self, hidden: Tensor) -> Tensor:
        """States [B, time, D] of any dtype -> float32 rows [N, D]: one a sample, or with `Pool.TOKENS` one a position.
        No other position is converted or copied."""
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        states = hidden[rows, self.index].float()
        if self.pool is Pool.TOKENS:
            return states[self.share > 0]
        return torch.einsum("bwd,bw->bd", states, self.share)


@torch.no_grad()
def read(model: Any, sites: Sequence[Site], take: Take, *, input_ids: Tensor, **inputs: Any) -> dict[Site, Tensor]:
    """`take` of the hidden states [batch, time, D] at each site, applied as soon as they are there, so that the whole
    states of one site do not wait for another's. `input_ids` [batch, time]; more `inputs` as the model takes them."""

    def shaped(hidden: Tensor) -> Tensor:
        return take(hidden.reshape(*input_ids.shape, -1))

    with _reading(model, sites, shaped) as seen, suppress(_AllSeen):
        model(input_ids=input_ids, **inputs)
    return {site: seen[site] for site in sites}


class _AllSeen(Exception):
    """Every site was read: the rest of the forward pass is not needed."""


@contextmanager
def _reading(model: nn.Module, sites: Sequence[Site], take: Take) -> Iterator[dict[Site, Tensor]]:
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> None:
        seen[site] = take(value[0] if isinstance(value, tuple) else value)
        if len(seen) == len(set(sites)):
            raise _AllSeen

    def reader(site: Site, end: str) -> Callable[..., None]:
        def read_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            keep(site, args)

        def read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(site, output)

        return read_input if end == "input" else read_output

    handles = []
    try:
        for site in dict.fromkeys(sites):
            module, end = site_module(model, site)
            register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
            handles.append(register(reader(site, end)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
