"""One forward pass of the model with the batch's steering: the only place that calls the model."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.types import PositionsName
from steering.columns import ColumnBank, RowSteering


class Forward:
    """A Hugging Face causal language model whose hooks read `bank`."""

    def __init__(self, model: Any, bank: ColumnBank) -> None:
        self.bank = bank
        self.device: torch.device = bank.device
        self.config: Any = model.config
        self._model = model
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_keep = "logits_to_keep" in accepted

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        cache: Any,
        rows: Sequence[RowSteering],
        token_rows: NDArray[np.int64],
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """ids, positions [rows, tokens]; mask [rows, cached + tokens], 0 where padded; token_rows [rows * tokens]: the
        index into `rows` of what steers a token, -1 for none -> logits [rows, tokens or 1, vocab] in the model's
        dtype, and how often each token was steered [rows, tokens] int64, as the hooks counted it.
        """
        self.bank.reserve(ids.numel())
        self.bank.fill(rows, token_rows)
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = positions
        if self._takes_keep and last_only:
            extra["logits_to_keep"] = 1
        try:
            with torch.inference_mode():
                output = self._model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **extra
                )
        finally:
            # Taken even from a pass that failed, so that nothing is counted twice.
            counts = self.bank.take_counts(ids.numel())
        logits: Tensor = output.logits[:, -1:] if last_only else output.logits
        return logits, counts.view(ids.shape)


def acts(positions: PositionsName, start: int, stop: int, prompt: int) -> NDArray[np.bool_]:
    """Which of the tokens start..stop of a sequence with `prompt` prompt tokens are steered.

    `generated` begins at the last prompt token: it is the one that produces the first new token.
    """
    index = np.arange(start, stop)
    if positions == "generated":
        return index >= prompt - 1
    if positions == "prompt":
        return index < prompt
    return np.ones(stop - start, dtype=np.bool_)
