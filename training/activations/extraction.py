"""Activations of labelled samples from a Hugging Face model: any layers and sites in one pass, resumable by shard.

1. job       the tokens, and hashes of all that decides their activations   plan.json
2. shards    samples of similar length, a file as soon as they are done     shard-00000.safetensors, ...
3. manifest  written last: labels, groups and splits of the samples         manifest.json

`accelerate launch --no_python matsteer extract ...` starts several processes, on one machine or many, that divide the
shards (without GPUs: `torchrun --nproc-per-node 2 --no-python matsteer extract ...`). All have to see the same folder.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from steering.chat_template import ChatTemplate
from steering.sites import text_config
from steering.types import Site
from training.activations import Pool
from training.activations.hidden_states import PooledPositions, read_hidden_states, shared_states, span, worth_sharing
from training.activations.store import (
    MANIFEST,
    Activations,
    label_rows,
    load_activations,
    model_hash,
    read_manifest,
    samples_hash,
    shard_samples,
    texts_hash,
    write_manifest,
    write_shard,
)
from training.activations.tokenization import Encoded, batches, check_ids, encode, pad_right
from training.data.samples import Form, Sample
from training.distributed import Processes, joined
from training.errors import ActivationError, DataError
from training.files import content_key, write_json
from training.progress import Advance, progress_bar

log = logging.getLogger(__name__)


States = Iterator[tuple[list[int], dict[Site, Tensor]]]

_SHARD_SIZE = 512
_MAX_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class ExtractionJob:
    """Samples and their tokens, with everything that decides their activations."""

    model: Any
    samples: Sequence[Sample]
    encoded: Sequence[Encoded]
    """Up to the last token whose activations count."""
    sites: tuple[Site, ...]
    pool: Pool
    max_rows: int
    max_tokens: int
    plan: dict[str, Any]
    """Hashes of what decides the activations: who has them, has the work."""
    sharing: bool
    """Whether samples with the same prompt run from the same keys and values."""
    chat: ChatTemplate | None = None

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
        chat: ChatTemplate | None = None,
    ) -> Self:
        """`chat`: renders samples that are conversations. Samples that nothing but the first position of their text
        stands for are left out, with a warning. Raises DataError without samples, or without a side of an attribute for
        that reason."""
        if not samples:
            raise DataError("There are no samples to extract activations from.")
        needed = [_needed(row, pool) for row in _encode(model, tokenizer, samples, chat)]
        samples, encoded = _poolable(samples, needed, pool)
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
            max_rows=max_rows,
            max_tokens=max_tokens,
            plan=plan,
            sharing=worth_sharing(model, list(dict.fromkeys(encoded))),
            chat=chat,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def source(self) -> dict[str, Any]:
        """The plan, the model's number of attention heads, the form of the texts with the chat template that rendered
        them, and a hash of what is known of the samples."""
        form = self.samples[0].form
        known: dict[str, Any] = {"heads": head_count(self.model), "form": form.value}
        if form is Form.CHAT and self.chat is not None:
            known["chat_template"] = self.chat.describe()
        return {**self.plan, **known, "data": samples_hash(self.samples)}

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
            yield from shared_states(self.model, rows, self.sites, self.pool, **limits)
            return
        for batch in batches([len(row.ids) for row in rows], **limits):
            part = [rows[i] for i in batch]
            ids, mask = pad_right([row.ids for row in part], self.device)
            take = PooledPositions.of(part, self.pool, self.device).take
            yield (
                batch,
                read_hidden_states(self.model, self.sites, take, input_ids=ids, attention_mask=mask, use_cache=False),
            )

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


def _encode(model: Any, tokenizer: Any, samples: Sequence[Sample], chat: ChatTemplate | None) -> list[Encoded]:
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    encoded = [encode(tokenizer, sample.prompt, sample.completion, sample.turns, chat) for sample in samples]
    check_ids(model, tokenizer, (row.ids for row in encoded))
    long = sum(len(row.ids) > limit for row in encoded)
    if long:
        log.warning("%d samples are longer than %d tokens: the beginnings of their prompts are dropped.", long, limit)
    return [row.clipped(limit) for row in encoded]


def head_count(model: nn.Module) -> int | None:
    """How many heads lie side by side at the attn_heads sites of a Hugging Face model; None where it does not say."""
    count = getattr(text_config(model), "num_attention_heads", None)
    return count if isinstance(count, int) else None


def _poolable(
    samples: Sequence[Sample], encoded: Sequence[Encoded], pool: Pool
) -> tuple[Sequence[Sample], Sequence[Encoded]]:
    """Without the samples that nothing but the first position of their text stands for, which are warned of. Raises
    DataError where an attribute loses a side by that."""
    kept = [index for index, row in enumerate(encoded) if span(row, pool)[0] > 0]
    if len(kept) == len(samples):
        return samples, encoded
    left = [samples[index] for index in kept]
    first = next(sample for sample, row in zip(samples, encoded, strict=True) if span(row, pool)[0] == 0)
    what = (
        f"{len(samples) - len(kept)} samples, as {first.text[:40]!r} of {first.attribute!r}, have nothing to pool by "
        f"{pool} but the text's first token, which is an attention sink"
    )
    remedy = f"give the texts a prompt or {'pool by mean' if pool is Pool.FIRST else 'more words'}"
    if _sides(left) != _sides(samples):
        raise DataError(f"{what}: {remedy}.")
    log.warning("%s; they are left out: %s.", what, remedy)
    return left, [encoded[index] for index in kept]


def _sides(samples: Sequence[Sample]) -> set[tuple[str, bool]]:
    return {(sample.attribute, sample.label) for sample in samples}


def _needed(row: Encoded, pool: Pool) -> Encoded:
    """Without what comes after the last position that counts. The text's first position, an attention sink whatever
    stands there, never counts where there is another."""
    if row.start == 0 and len(row.ids) > 1 and pool in (Pool.MEAN, Pool.TOKENS):
        row = Encoded(row.ids, 1, row.end)
    last = span(row, pool)[-1]
    return Encoded(row.ids[: last + 1], row.start, last if pool is Pool.FIRST else row.end)


def extract(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    chat: ChatTemplate | None = None,
    pool: Pool = Pool.MEAN,
    out: Path | None = None,
    max_rows: int = 64,
    max_tokens: int = _MAX_TOKENS,
    shard_size: int = _SHARD_SIZE,
    progress: bool = False,
) -> Activations:
    """Run every sample once and keep float32 activations [N, D] at each site, pooled as `pool` says.

    With `out`, they are written there by `extract_to` and read back. Raises DataError without samples,
    ActivationError when `out` belongs to a different extraction.
    """
    job = ExtractionJob.of(model, tokenizer, samples, sites, pool, max_rows, max_tokens, chat)
    if out is not None:
        _store(job, out, shard_size, progress)
        return load_activations(out)
    with progress_bar("extract", len(job.samples), "samples", shown=progress) as advance:
        values, owner = job.run(range(len(job.samples)), advance)
    return label_rows(values, owner, job.samples, pool, job.source)


def extract_to(
    out: Path,
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    chat: ChatTemplate | None = None,
    pool: Pool = Pool.MEAN,
    max_rows: int = 64,
    max_tokens: int = _MAX_TOKENS,
    shard_size: int = _SHARD_SIZE,
    progress: bool = False,
) -> int:
    """`extract` into a folder that `load_activations` reads; the number of rows. Memory: one shard of `shard_size`
    samples. Shards that an earlier call, or another process of this one, has finished are not computed again."""
    job = ExtractionJob.of(model, tokenizer, samples, sites, pool, max_rows, max_tokens, chat)
    return _store(job, out, shard_size, progress)


def extract_under(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    chat: ChatTemplate | None = None,
    pool: Pool = Pool.MEAN,
    max_rows: int = 64,
    progress: bool = False,
) -> Activations:
    """`extract` into `folder`/activations-KEY, where KEY stands for all that decides the activations."""
    job = ExtractionJob.of(model, tokenizer, samples, sites, pool, max_rows, _MAX_TOKENS, chat)
    out = folder / f"activations-{content_key(job.plan)}"
    _store(job, out, _SHARD_SIZE, progress)
    return load_activations(out)


def _store(job: ExtractionJob, out: Path, shard_size: int, progress: bool) -> int:
    """Compute what is missing in `out`; the number of rows."""
    processes = joined(cpu=job.device.type == "cpu")
    _claim(out, job.plan, processes)
    shards = dict(_divide(job.order, shard_size))
    stored = _finished_shards(out)
    pending = [] if stored else [name for name, chosen in shards.items() if not _is_done(out / name, chosen)]
    processes.wait()  # all know what is pending before anything is written
    # The longest texts first: what does not fit into memory fails at once, and the last shards are the quickest.
    own = pending[::-1][processes.index :: processes.count]
    left = sum(len(shards[name]) for name in own)
    total = len(job.samples) if processes.count == 1 else left
    with progress_bar("extract", total, "samples", shown=progress and processes.main, done=total - left) as advance:
        for name in own:
            _write(job, out / name, shards[name], advance)
    processes.wait()
    names = stored or list(shards)
    if processes.main:
        _finish(job, out, names)
    processes.wait()
    return sum(len(shard_samples(out / name)) for name in names)


def _write(job: ExtractionJob, path: Path, chosen: Sequence[int], advance: Advance) -> None:
    values, owner = job.run(chosen, advance)
    write_shard(path, values, owner)


def _claim(out: Path, plan: Mapping[str, Any], processes: Processes) -> None:
    """Raises ActivationError where the folder belongs to another plan."""
    path = out / "plan.json"
    if processes.main and not path.exists():
        write_json(path, plan)
    processes.wait()
    if not path.exists():
        raise ActivationError(f"{path} is missing in process {processes.index}: all must see the same folder.")
    if json.loads(path.read_text(encoding="utf-8")) != plan:
        raise ActivationError(
            f"{out} holds activations of another model, data set, pooling or choice of sites: "
            "choose another folder or delete it."
        )


def _divide(order: Sequence[int], shard_size: int) -> Iterator[tuple[str, list[int]]]:
    """Names of the shards, and the samples in each."""
    for number, begin in enumerate(range(0, len(order), shard_size)):
        yield f"shard-{number:05d}.safetensors", list(order[begin : begin + shard_size])


def _finished_shards(out: Path) -> list[str]:
    """The shards of a complete folder, however it was divided; none where it is not complete."""
    return list(read_manifest(out)["shards"]) if (out / MANIFEST).exists() else []


def _is_done(path: Path, chosen: Sequence[int]) -> bool:
    """Whether a shard of exactly these samples is there."""
    if not path.exists():
        return False
    try:
        return set(shard_samples(path).tolist()) == set(chosen)
    except ActivationError as error:
        log.warning("%s It is computed again.", error)
        return False


def _finish(job: ExtractionJob, out: Path, names: Sequence[str]) -> None:
    """The manifest, last: again where only labels, groups or splits have changed."""
    if missing := [name for name in names if not (out / name).exists()]:
        raise ActivationError(f"{out / missing[0]} is missing: all processes must see the same folder.")
    if not (out / MANIFEST).exists() or read_manifest(out)["plan"] != job.source:
        write_manifest(out, plan=job.source, samples=job.samples, sites=job.sites, shards=names)
