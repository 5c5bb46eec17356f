"""What an extraction computes: the tokens of its samples, and the activations of any of them."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from steering.types import Site
from training.activations.fingerprint import model_hash, samples_hash, texts_hash
from training.activations.heads import head_count
from training.activations.hidden_states import Wanted, read, span
from training.activations.prompt_sharing import shared_states, worth_sharing
from training.activations.tokens import Encoded, batches, encode, pad_right, pad_token
from training.choices import Pool
from training.data.samples import Sample
from training.errors import DataError
from training.progress import Advance

log = logging.getLogger(__name__)

States = Iterator[tuple[list[int], dict[Site, Tensor]]]


@dataclass(frozen=True, eq=False)
class Work:
    """Samples and their tokens, with everything that decides their activations."""

    model: Any
    samples: Sequence[Sample]
    encoded: Sequence[Encoded]
    """Up to the last token whose activations count."""
    sites: tuple[Site, ...]
    pool: Pool
    pad_id: int
    max_rows: int
    max_tokens: int
    plan: dict[str, Any]
    """Hashes of what decides the activations: who has them, has the work."""
    sharing: bool
    """Whether samples with the same prompt run from the same keys and values."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        samples: Sequence[Sample],
        sites: Sequence[Site],
        pool: Pool,
        max_rows: int,
        max_tokens: int,
    ) -> Self:
        """Raises DataError without samples."""
        if not samples:
            raise DataError("There are no samples to extract activations from.")
        encoded = [_needed(row, pool) for row in _encode(model, tokenizer, samples)]
        plan = {
            "model": model_hash(model),
            "texts": texts_hash(encoded),
            "sites": [str(site) for site in sites],
            "pool": pool.value,
        }
        return cls(
            model=model,
            samples=samples,
            encoded=encoded,
            sites=tuple(dict.fromkeys(sites)),
            pool=pool,
            pad_id=pad_token(tokenizer),
            max_rows=max_rows,
            max_tokens=max_tokens,
            plan=plan,
            sharing=worth_sharing(model, list(dict.fromkeys(encoded))),
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def source(self) -> dict[str, Any]:
        """The plan, the model's number of attention heads, and a hash of what is known of the samples."""
        return {**self.plan, "heads": head_count(self.model), "data": samples_hash(self.samples)}

    @property
    def order(self) -> list[int]:
        """The samples, so that what lies together runs well together: shortest first, those of one prompt in a row."""

        def key(index: int) -> tuple[Any, ...]:
            row = self.encoded[index]
            prompt = row.ids[: row.start] if self.sharing else ()
            return len(prompt), prompt, len(row.ids), row.ids, index

        return sorted(range(len(self.encoded)), key=key)

    def run(self, chosen: Sequence[int], advance: Advance) -> tuple[dict[Site, Tensor], Tensor]:
        """Float32 rows [N, D] at each site, on the CPU, in the order of these samples, and the sample of each row [N].

        What several samples have in common runs once; only the rows that are kept leave the model's device.
        """
        same: dict[Encoded, list[int]] = {}
        for place, index in enumerate(chosen):
            same.setdefault(self.encoded[index], []).append(place)
        rows, owners = list(same), list(same.values())
        counts = torch.tensor([self._count(self.encoded[index]) for index in chosen])
        starts = counts.cumsum(0) - counts
        values: dict[Site, Tensor] = {}
        for batch, states in self._states(rows):
            sources, targets = _copies([self._count(rows[i]) for i in batch], [starts[owners[i]] for i in batch])
            for site, found in states.items():
                if site not in values:
                    values[site] = torch.empty(int(counts.sum()), found.shape[1])
                values[site][targets] = found.cpu()[sources]
            advance(sum(len(owners[i]) for i in batch))
        return values, torch.tensor(chosen).repeat_interleave(counts)

    def _states(self, rows: Sequence[Encoded]) -> States:
        """Batches of rows of similar length, by their indices, with what is kept of them at each site."""
        limits = {"max_rows": self.max_rows, "max_tokens": self.max_tokens}
        if self.sharing:
            yield from shared_states(self.model, rows, self.sites, self.pool, self.pad_id, **limits)
            return
        for batch in batches([len(row.ids) for row in rows], **limits):
            part = [rows[i] for i in batch]
            ids, mask = pad_right([row.ids for row in part], self.pad_id, self.device)
            take = Wanted.of(part, self.pool, self.device).take
            yield batch, read(self.model, self.sites, take, input_ids=ids, attention_mask=mask, use_cache=False)

    def _count(self, row: Encoded) -> int:
        """Rows that are kept of a sample."""
        return len(span(row, self.pool)) if self.pool is Pool.TOKENS else 1


def _copies(counts: Sequence[int], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where each found row comes from and goes to, when the i-th `counts` rows go to each of the i-th `targets`."""
    sources, places, at = [], [], 0
    for count, starts in zip(counts, targets, strict=True):
        own = torch.arange(count)
        sources.append((at + own).repeat(len(starts)))
        places.append((starts[:, None] + own).flatten())
        at += count
    return torch.cat(sources), torch.cat(places)


def _encode(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[Encoded]:
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    encoded = [encode(tokenizer, sample.prompt, sample.completion) for sample in samples]
    long = sum(len(row.ids) > limit for row in encoded)
    if long:
        log.warning("%d samples are longer than %d tokens: the beginnings of their prompts are dropped.", long, limit)
    return [row.clipped(limit) for row in encoded]


def _needed(row: Encoded, pool: Pool) -> Encoded:
    """Without what comes after the last position that counts."""
    last = span(row, pool)[-1]
    return Encoded(row.ids[: last + 1], row.start, last if pool is Pool.FIRST else row.end)
