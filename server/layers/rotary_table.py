"""The cosines and sines of rotary position embeddings, computed once for every position instead of in every pass."""

from typing import Any

import torch
from torch import Tensor, nn

SHORTEST, LONGEST = 256, 2**15  # positions of the first table and of the last: beyond, angles are computed
FIXED = frozenset({"default", "linear", "llama3", "yarn"})  # kinds whose angles depend on nothing but the position


class RotaryTable(nn.Module):
    """Stands for a model's module that makes cosines and sines [1, N, width] of positions [1, N]: `own` makes the
    table, and answers what the table cannot."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}  # by what `own` is asked besides positions

    def forward(self, x: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        last = int(position_ids.max()) if position_ids.numel() else LONGEST
        if position_ids.dim() != 2 or position_ids.shape[0] != 1 or last >= LONGEST:
            own: tuple[Tensor, Tensor] = self.own(x, position_ids, *more, **named)
            return own
        places, asked = position_ids[0], (x.dtype, more, tuple(named.items()))
        table = self._tables.get(asked)
        if table is None or last >= len(table[0]):
            every = torch.arange(max(SHORTEST, 1 << last.bit_length()), device=places.device)[None]
            cos, sin = self.own(x, every, *more, **named)
            table = self._tables[asked] = cos[0], sin[0]
        return table[0].index_select(0, places)[None], table[1].index_select(0, places)[None]

    def __getattr__(self, name: str) -> Any:
        """What models read of `own`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("own"), name)


def tabulate_rotary(model: Any) -> int:
    """Replaces what makes cosines and sines in a model on a CPU, in place, where they depend on the position alone;
    says how many."""
    tabulated = 0
    for parent in list(model.modules()):
        for name, child in [] if isinstance(parent, RotaryTable) else list(parent.named_children()):
            if not type(child).__name__.endswith("RotaryEmbedding"):
                continue
            mine = RotaryTable(child)
            if _is_fixed(child) and _says_the_same(mine, child):
                setattr(parent, name, mine)
                tabulated += 1
    return tabulated


def _is_fixed(own: nn.Module) -> bool:
    kinds = getattr(own, "rope_type", None)
    buffer = next(own.buffers(), None)
    every = kinds.values() if isinstance(kinds, dict) else [kinds]
    return buffer is not None and buffer.device.type == "cpu" and FIXED.issuperset(every)


def _says_the_same(mine: RotaryTable, own: Any) -> bool:
    """Asked as models ask: with the positions, and where there are several kinds of layers with the kind."""
    positions = torch.tensor([[3, 0, SHORTEST + 7, 3]])
    try:
        for more in [(kind,) for kind in own.rope_type] if isinstance(own.rope_type, dict) else [()]:
            expected = own(torch.zeros(1), positions, *more)
            for found, other in zip(mine(torch.zeros(1), positions, *more), expected, strict=True):
                if found.shape != other.shape or not torch.allclose(found, other, rtol=1e-6, atol=1e-6):
                    return False
    except Exception:  # it is called with something else
        return False
    return True
