"""One forward pass of the model with the batch's steering: the only place that calls the model."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.attention import NAME, Attention
from server.engine.tape import Work, acts
from steering.columns import ColumnBank
from steering.hook import Steering
from steering.types import RowSteering


class Forward:
    """A Hugging Face causal language model whose attention reads `attention` and whose steering hooks, once they are
    installed, read `bank`."""

    def __init__(self, model: Any, bank: ColumnBank) -> None:
        self.bank = bank
        self.steering = Steering(model, bank)
        self.device: torch.device = bank.device
        head = model.get_output_embeddings()
        self.vocab: int = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
        self.attention = Attention(bank.device)
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.set_attn_implementation(NAME)

    def __call__(self, works: Sequence[Work], wanted: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Computes the works as one line of N tokens. `wanted`: the tokens, by their place in the line, whose logits
        are needed -> logits [wanted, vocab] in the model's dtype, and how often each token of the line was steered
        [N] int64, as the hooks counted it.
        """
        tokens = [token for work in works for token in work.tape.tokens[work.start : work.stop]]
        places = np.concatenate([np.arange(work.start, work.stop) for work in works])
        self.bank.reserve(len(tokens))
        self._steer(works)
        line = torch.from_numpy(np.stack([np.array(tokens, dtype=np.int64), places])).to(self.device)
        keep = torch.tensor(wanted, dtype=torch.int64).to(self.device)
        try:
            with torch.inference_mode(), self.attention.using(works):
                output = self._model(
                    input_ids=line[:1],
                    position_ids=line[1:],
                    use_cache=False,
                    return_dict=True,
                    **({"logits_to_keep": keep} if self._keeps else {}),
                )
        finally:
            # Taken even from a pass that failed, so that nothing is counted twice.
            counts = self.bank.take_counts(len(tokens))
        logits: Tensor = output.logits[0] if self._keeps else output.logits[0, keep]
        return logits, counts

    def _steer(self, works: Sequence[Work]) -> None:
        rows: dict[RowSteering, int] = {}
        token_rows = []
        for work in works:
            steer, prompt = work.tape.steer, work.tape.prompt
            row = rows.setdefault(steer.columns, len(rows))
            if len(work) == 1 and work.start >= prompt:
                token_rows.append([-1 if steer.positions == "prompt" else row])
            else:
                token_rows.append(np.where(acts(steer.positions, work.start, work.stop, prompt), row, -1).tolist())
        self.bank.fill(tuple(rows), np.fromiter((row for part in token_rows for row in part), dtype=np.int64))
