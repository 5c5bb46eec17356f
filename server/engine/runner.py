"""Tensors: runs the batch that the scheduler chose, one forward and one draw a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from server.engine.comparison import compare
from server.engine.forward import Forward, acts
from server.engine.sampler import Drawn, Sampler
from server.engine.types import Batch, Divergence, Draw, Pair, Row, TokenLogprob
from steering.columns import UNSTEERED

# Ended rows stay in the tensors until this share of them has ended: taking rows out copies the whole cache.
CROWDED = 0.25


@dataclass(eq=False)
class _State:
    """One static batch on the device: left-padded, so that every row's last token is in the last column."""

    rows: list[Row | None]  # None: ended, and still in the tensors
    cache: DynamicCache
    mask: Tensor | None  # [rows, cached tokens] int64, 0 where padded; None: no padding
    position: Tensor  # [rows, 1] int64, of the next token to feed
    tokens: Tensor  # [rows, 1] int64, the next token to feed
    sampler: Sampler


class Runner:
    """Keeps one batch between its steps."""

    def __init__(self, forward: Forward, *, context: int | None) -> None:
        self.forward = forward
        self._context = context
        self._state: _State | None = None

    @property
    def rows(self) -> int:
        """Rows in the tensors now, ended ones included."""
        return len(self._state.rows) if self._state else 0

    def step(self, batch: Batch) -> list[Draw]:
        """One token for each row of the batch, in its order. A fresh batch is prefilled, another one decoded."""
        if batch.fresh:
            drawn, counts = self._prefill(batch.rows)
        else:
            self._settle(batch.rows)
            drawn, counts = self._decode()
        draws = self._to_host(drawn, counts)
        return [draws[row] for row in batch.rows]

    def compare(self, pair: Pair) -> Divergence:
        """See engine.comparison; the batch that is running is not touched."""
        return compare(self.forward, pair)

    def rest(self) -> None:
        """Forget the batch, which frees its cache."""
        self._state = None

    def recover(self) -> None:
        """Forget the batch; raises when the device does not answer any more."""
        self.rest()
        torch.zeros(1, device=self.forward.device).add_(1).item()

    def _prefill(self, rows: Sequence[Row]) -> tuple[Drawn, Tensor]:
        self.rest()  # two caches at once may be more than the device holds
        width = max(len(row.tokens) for row in rows)
        ids = np.zeros((len(rows), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        token_rows = np.full_like(ids, -1)
        for index, row in enumerate(rows):
            length = len(row.tokens)
            ids[index, width - length :] = row.tokens
            mask[index, width - length :] = 1
            token_rows[index, width - length :] = np.where(acts(row.steer.positions, 0, length, length), index, -1)
        device = self.forward.device
        attention = torch.from_numpy(mask).to(device)
        positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.forward.config)
        logits, counts = self.forward(
            torch.from_numpy(ids).to(device),
            positions,
            cache=cache,
            rows=[row.steer.columns for row in rows],
            token_rows=token_rows.reshape(-1),
            mask=None if mask.all() else attention,
            last_only=True,
        )
        sampler = Sampler([row.sampling for row in rows], [row.tokens for row in rows], logits.shape[-1], device)
        drawn = sampler.draw(logits[:, -1])
        self._state = _State(
            rows=list(rows),
            cache=cache,
            mask=None if mask.all() else attention,
            position=positions[:, -1:] + 1,
            tokens=drawn.tokens[:, None],
            sampler=sampler,
        )
        return drawn, counts.sum(dim=1)

    def _decode(self) -> tuple[Drawn, Tensor]:
        state = self._running()
        if state.mask is not None:
            state.mask = torch.cat([state.mask, state.mask.new_ones(len(state.rows), 1)], dim=1)
        logits, counts = self.forward(
            state.tokens,
            state.position,
            cache=state.cache,
            rows=[row.steer.columns if row else UNSTEERED for row in state.rows],
            token_rows=np.array([i if self._decode_acts(row) else -1 for i, row in enumerate(state.rows)]),
            mask=state.mask,
        )
        drawn = state.sampler.draw(logits[:, -1])
        state.tokens = drawn.tokens[:, None]
        state.position = state.position + 1
        if self._context is not None:
            # An ended row that is still in the tensors must not run past the model's last position.
            state.position = state.position.clamp(max=self._context - 1)
        return drawn, counts.sum(dim=1)

    @staticmethod
    def _decode_acts(row: Row | None) -> bool:
        return row is not None and row.steer.positions != "prompt"

    def _settle(self, rows: Sequence[Row]) -> None:
        """Note which rows have ended; take them out of the tensors once there are enough of them."""
        state = self._running()
        alive = set(rows)
        state.rows = [row if row in alive else None for row in state.rows]
        ended = state.rows.count(None)
        if ended == 0 or ended < CROWDED * len(state.rows):
            return
        kept = torch.tensor([i for i, row in enumerate(state.rows) if row], device=self.forward.device)
        with torch.inference_mode():
            state.cache.batch_select_indices(kept)
        state.mask = state.mask[kept] if state.mask is not None else None
        state.position = state.position[kept]
        state.tokens = state.tokens[kept]
        state.sampler.select(kept)
        state.rows = [row for row in state.rows if row]

    def _to_host(self, drawn: Drawn, counts: Tensor) -> dict[Row, Draw]:
        """The one copy from the device a step needs; logprobs, where asked for, are a second one."""
        tokens, steered, finite = torch.stack([drawn.tokens, counts, drawn.finite.long()]).tolist()
        chosen = drawn.logprobs.tolist() if drawn.logprobs is not None else None
        top_tokens = drawn.top_tokens.tolist() if drawn.top_tokens is not None else None
        top_logprobs = drawn.top_logprobs.tolist() if drawn.top_logprobs is not None else None
        draws = {}
        for i, row in enumerate(self._running().rows):
            if row is None:
                continue
            wanted = row.sampling.logprobs
            logprob = TokenLogprob(tokens[i], chosen[i]) if chosen and wanted is not None else None
            top = zip(top_tokens[i], top_logprobs[i], strict=True) if top_tokens and top_logprobs and wanted else ()
            likeliest = tuple(TokenLogprob(*pair) for pair in top)[:wanted]
            draws[row] = Draw(tokens[i], steered[i], bool(finite[i]), logprob, likeliest)
        return draws

    def _running(self) -> _State:
        if self._state is None:
            raise RuntimeError("a batch must be prefilled before it is decoded")
        return self._state
