"""One forward pass of the model with the batch's steering: the only place that calls the model."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.attention.interface import NAME, Attention, PassPlan
from server.attention.plan import Plan
from server.engine.graphs import Graphs
from server.engine.tape import Work, acts
from steering.columns import ColumnBank
from steering.hook import Steering
from steering.row_table import upload
from steering.types import RowSteering


class Forward:
    """A Hugging Face causal language model whose attention reads `attention` and whose steering hooks, once they are
    installed, read `bank`."""

    def __init__(self, model: Any, bank: ColumnBank, *, native: bool = True) -> None:
        """`native`: kernels that are compiled for this CPU, where it is one and they can be had."""
        self.bank = bank
        self.steering = Steering(model, bank, native=native)
        self.device: torch.device = bank.device
        head = model.get_output_embeddings()
        self.vocab: int = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
        self.attention = Attention(bank.device, native=native)
        self._graphs: Graphs | None = None
        self._model = model
        self._spread = is_spread(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.set_attn_implementation(NAME)

    def allocate(self, tokens: int, *, graphs: bool = False) -> None:
        """Makes room for the keys and values of so many tokens. `graphs`: decoding steps have static shapes, and are
        replayed from CUDA graphs where the device has them."""
        self.attention.allocate(tokens + 1)  # the last one belongs to rows of a graph that are idle
        self._graphs = Graphs(self._run, self.device, idle=tokens) if graphs else None

    def __call__(
        self, works: Sequence[Work], wanted: Sequence[int], ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the works as one line of N tokens. `wanted`: the tokens, by their place in the line, whose logits
        are needed -> logits [wanted, vocab] in the model's dtype, and how often each token of the line was steered
        [N] int64, as the hooks counted it. `ids`: the tokens [N] int64, where the host does not know them.
        """
        tokens = sum(map(len, works))
        static = self._graphs if self._graphs and self._graphs.fits(works) and not self.steering.traced else None
        room = static.rows(works) if static else tokens
        self.bank.reserve(room)
        self._steer(works, room)
        if ids is None:
            known = [token for work in works for token in work.tokens]
            ids = upload(np.array(known, dtype=np.int64), self.device)
        try:
            with torch.inference_mode():
                if static:
                    if static.prepare(works, ids, self.bank.version):
                        self.bank.take_counts()  # passes that were only made to record
                    logits = static(works, ids)
                else:
                    logits = self._eager(works, wanted, ids)
        finally:
            # Taken even from a pass that failed, so that nothing is counted twice.
            counts = self.bank.take_counts(tokens)
        return logits, counts

    def _eager(self, works: Sequence[Work], wanted: Sequence[int], ids: Tensor) -> Tensor:
        plan = Plan.of([work.chunk for work in works], self.device, self.attention.call, self.attention.decode)
        keep = None
        if list(wanted) != list(range(len(ids))):
            keep = upload(np.array(wanted, dtype=np.int64), torch.device("cpu") if self._spread else self.device)
        return self._run(ids[None], plan.places[None], plan, keep)

    def _run(self, ids: Tensor, positions: Tensor, plan: PassPlan, keep: Tensor | None = None) -> Tensor:
        """ids, positions [1, N] -> logits [N, vocab], or those of the tokens to `keep`."""
        selected = {"logits_to_keep": keep} if self._keeps and keep is not None else {}
        with self.attention.using(plan):
            output = self._model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **selected)
        logits: Tensor = output.logits[0].to(self.device)
        return logits if selected or keep is None else logits[keep]

    def _steer(self, works: Sequence[Work], room: int) -> None:
        """Fills the bank for the tokens of the works, and for idle ones up to `room`."""
        rows: dict[RowSteering, int] = {}
        token_rows: list[int] = []
        for work in works:
            steer, prompt = work.tape.steer, work.tape.prompt
            row = rows.setdefault(steer.columns, len(rows))
            if len(work) == 1 and work.start >= prompt:
                token_rows.append(-1 if steer.positions == "prompt" else row)
            else:
                token_rows += np.where(acts(steer.positions, work.start, work.stop, prompt), row, -1).tolist()
        token_rows += [-1] * (room - len(token_rows))
        self.bank.fill(tuple(rows), np.array(token_rows, dtype=np.int64))


def is_spread(model: Any) -> bool:
    """Whether accelerate has put the model's layers on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1
