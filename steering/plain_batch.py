"""Which tokens of a plain Hugging Face forward pass are steered, and by how much."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering.bank import ColumnBank
from steering.errors import ColumnError, HookError
from steering.types import Handle, Positions, SequenceSteering


class PlainBatch:
    """Fills the bank before every forward pass of a model: `before` is a forward pre-hook (with kwargs)."""

    def __init__(
        self,
        bank: ColumnBank,
        handle: Handle,
        multipliers: Sequence[float] | Tensor,
        mask: Tensor | None,
        positions: Positions,
    ) -> None:
        self.bank = bank
        self.rows = _rows(handle, multipliers)
        self.latches = any(column.reads and column.reads.latched for column in bank.columns(handle))
        self.lines: NDArray[np.int64] | None = None  # of the latched gates of each row, once they are set
        self.mask = None if mask is None else mask.detach().cpu().numpy().astype(bool)
        self.positions = Positions(positions)
        if self.latches and mask is None and self.positions is not Positions.GENERATED:
            raise HookError(
                f"a latched gate is known from the last prompt token on: positions must be 'generated', not "
                f"{self.positions.value!r}"
            )

    def keep(self, rows: Sequence[int]) -> None:
        """From now on the batch is of these rows, in their order, each with multipliers of its own."""
        if len(self.rows) > 1:
            self.rows = tuple(self.rows[row] for row in rows)
        if self.lines is not None:
            self.lines = self.lines[list(rows)]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise HookError("a steered forward pass needs input_ids or inputs_embeds")
        past = given.get("past_key_values")
        cached = 0 if past is None else int(past.get_seq_length())
        batch, length = inputs.shape[:2]
        chosen = self._chosen(batch, length, cached, given.get("attention_mask"))
        rows = self._row_of_each(batch)
        self.bank.reserve(batch * length)
        self.bank.fill(self.rows, np.where(chosen, rows[:, None], -1), self._token_lines(chosen, cached))

    def _chosen(self, batch: int, length: int, cached: int, attention_mask: Any) -> NDArray[np.bool_]:
        """Which tokens are steered, [batch, length]."""
        if self.mask is not None:
            if self.mask.shape != (batch, cached + length):
                raise HookError(
                    f"the mask is for one forward pass of shape {list(self.mask.shape)}, "
                    f"not for one of shape {[batch, length]} after {cached} cached tokens"
                )
            return self.mask[:, cached:]
        if self.positions is Positions.PROMPT and cached:
            return np.zeros((batch, length), dtype=bool)
        if self.positions is Positions.GENERATED:
            if not cached and not _real(attention_mask, batch, length, lenient=True)[:, -1].all():
                raise HookError("positions 'generated' needs left padding: a row of this batch ends in padding")
            return np.broadcast_to(np.arange(length) == length - 1, (batch, length))
        return _real(attention_mask, batch, length)

    def _token_lines(self, chosen: NDArray[np.bool_], cached: int) -> NDArray[np.int64] | None:
        """For `ColumnBank.fill`, of tokens of which some are `chosen` [batch, length]."""
        if not self.latches:
            return None
        if self.mask is not None and self.mask[:, :cached].any():
            raise HookError("a latched gate was set by a token that is cached: its value is not known here")
        first = np.zeros_like(chosen)
        if self.lines is None or self.mask is not None:
            self.lines = np.arange(1, len(chosen) + 1)
            self.bank.reserve_lines(len(chosen))
            first = chosen & (chosen.cumsum(axis=1) == 1)
        if len(chosen) != len(self.lines):
            raise HookError(f"gates were latched for {len(self.lines)} rows, but the batch has {len(chosen)}")
        lines = self.lines[:, None]
        return np.stack([np.where(chosen, lines, 0).reshape(-1), np.where(first, lines, 0).reshape(-1)])

    def _row_of_each(self, batch: int) -> NDArray[np.int64]:
        """The steering row of each batch row; generate repeats a prompt's row for its beams and sequences."""
        if batch % len(self.rows):
            raise HookError(f"multipliers were given for {len(self.rows)} rows, but the batch has {batch}")
        return np.arange(batch) // (batch // len(self.rows))


def _real(attention_mask: Any, batch: int, length: int, *, lenient: bool = False) -> NDArray[np.bool_]:
    """Which tokens are not padding, [batch, length], from the mask over cached and new tokens [batch, past + new]."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        real: NDArray[np.bool_] = attention_mask[:, -length:].detach().cpu().numpy().astype(bool)
        return real
    if attention_mask is None or lenient:
        return np.ones((batch, length), dtype=bool)
    raise HookError("positions 'prompt' and 'all' need a two-dimensional attention mask to know the padding")


def _rows(handle: Handle, multipliers: Sequence[float] | Tensor) -> tuple[SequenceSteering, ...]:
    table = torch.as_tensor(multipliers, dtype=torch.float64)
    if table.dim() not in (1, 2) or table.shape[-1] != len(handle) or not len(table):
        raise ColumnError(f"multipliers must have shape [{len(handle)}] or [B, {len(handle)}], not {list(table.shape)}")
    lines: list[list[float]] = table.reshape(-1, len(handle)).tolist()
    return tuple(SequenceSteering.of([(handle, line)]) for line in lines)
