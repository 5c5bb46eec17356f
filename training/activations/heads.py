"""Attention heads by name: "14.3" is head 3 of layer 14, a slice of the activations at site 14.attn_heads."""

import re
from dataclasses import dataclass
from typing import Self

from torch import nn

from steering.sites import text_config
from steering.types import Site, SiteKind
from training.errors import FitError


@dataclass(frozen=True, order=True)
class Head:
    """One attention head: the block with index `layer`, and the head's place among those of the block."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"

    @property
    def site(self) -> Site:
        return Site(self.layer, SiteKind.ATTN_HEADS)

    def span(self, width: int) -> slice:
        """The head's dimensions at its site, where every head is `width` wide."""
        return slice(self.index * width, (self.index + 1) * width)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises FitError."""
        found = re.fullmatch(r"(\d+)\.(\d+)", text.strip(), re.ASCII)
        if found is None:
            raise FitError(f"A head is written LAYER.HEAD, as in 14.3, not {text!r}.")
        return cls(int(found[1]), int(found[2]))


def parse_heads(text: str) -> tuple[Head, ...]:
    """Heads separated by commas, each once, in order. Raises FitError."""
    return tuple(sorted({Head.parse(part) for part in text.split(",")}))


def head_count(model: nn.Module) -> int | None:
    """How many heads lie side by side at the attn_heads sites of a Hugging Face model; None where it does not say."""
    count = getattr(text_config(model), "num_attention_heads", None)
    return count if isinstance(count, int) else None
