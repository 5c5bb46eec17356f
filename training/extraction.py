"""Activations of labelled samples from a Hugging Face model: any layers and sites in one pass, resumable by shard."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.sites import site_module
from steering.types import Site
from training.activations import (
    MANIFEST,
    Activations,
    join_shards,
    load_activations,
    read_shard,
    row_tensors,
    write_manifest,
)
from training.choices import Pool
from training.data.records import Sample
from training.errors import ActivationError, DataError
from training.files import content_key, write_json, write_tensors
from training.progress import progress_bar
from training.tokens import Encoded, batches, encode, pad_right, pad_token

log = logging.getLogger(__name__)


def extract(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    pool: Pool = Pool.MEAN,
    out: Path | None = None,
    max_rows: int = 64,
    max_tokens: int = 8192,
    shard_size: int = 512,
    progress: bool = False,
) -> Activations:
    """Run every sample once and keep float32 activations [N, D] at each site, pooled as `pool` says.

    With `out`, finished shards of `shard_size` samples are kept there and found again by the next call; the manifest
    is written last. Raises DataError without samples, ActivationError when `out` belongs to a different extraction.
    """
    if not samples:
        raise DataError("There are no samples to extract activations from.")
    plan = {"pool": pool.value, **fingerprint(model, tokenizer, samples, sites)}
    if out is not None and _begin(out, plan):
        return load_activations(out)
    encoded = _encode_all(model, tokenizer, samples)
    order = sorted(range(len(samples)), key=lambda i: (len(encoded[i].ids), i))
    shards, names = [], []
    with progress_bar("extract", len(samples), "samples", shown=progress) as advance:
        for number, begin in enumerate(range(0, len(order), shard_size)):
            chosen = order[begin : begin + shard_size]
            names.append(f"shard-{number:05d}.safetensors")
            path = out and out / names[-1]
            if path is not None and path.exists():
                shards.append(read_shard(path))
                advance(len(chosen))
                continue
            shards.append(
                _run(model, pad_token(tokenizer), encoded, chosen, sites, pool, max_rows, max_tokens, advance)
            )
            if path is not None:
                write_tensors(path, shards[-1])
    if out is not None:
        write_manifest(out, plan=plan, samples=samples, sites=sites, shards=names)
    return join_shards(shards, samples, sites, pool, plan)


def extract_under(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    pool: Pool = Pool.MEAN,
    max_rows: int = 64,
    progress: bool = False,
) -> Activations:
    """`extract` into `folder`/activations-KEY, where KEY stands for all that decides the activations."""
    key = content_key({"pool": pool.value, **fingerprint(model, tokenizer, samples, sites)})
    out = folder / f"activations-{key}"
    return extract(model, tokenizer, samples, sites, pool=pool, out=out, max_rows=max_rows, progress=progress)


def fingerprint(model: Any, tokenizer: Any, samples: Sequence[Sample], sites: Sequence[Site]) -> dict[str, Any]:
    """What decides the activations: a few numbers of every weight, the texts with their labels, the sites."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        weights.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    data = hashlib.sha256(json.dumps([asdict(sample) for sample in samples]).encode())
    return {
        "model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "weights": weights.hexdigest(),
        "tokenizer_size": len(tokenizer),
        "data": data.hexdigest(),
        "sites": [str(site) for site in sites],
    }


def _begin(out: Path, plan: Mapping[str, Any]) -> bool:
    """Claim the folder for this plan; True when it already holds the whole result."""
    path = out / "plan.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != plan:
            raise ActivationError(
                f"{out} holds activations of another model, data set, pooling or choice of sites: "
                "choose another folder or delete it."
            )
        return (out / MANIFEST).exists()
    write_json(path, plan)
    return False


def _encode_all(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[Encoded]:
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    encoded = [encode(tokenizer, sample.prompt, sample.completion) for sample in samples]
    long = sum(len(row.ids) > limit for row in encoded)
    if long:
        log.warning("%d samples are longer than %d tokens: the beginnings of their prompts are dropped.", long, limit)
    return [row.clipped(limit) for row in encoded]


def _run(
    model: Any,
    pad_id: int,
    encoded: Sequence[Encoded],
    chosen: Sequence[int],
    sites: Sequence[Site],
    pool: Pool,
    max_rows: int,
    max_tokens: int,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    values: dict[Site, list[Tensor]] = {site: [] for site in sites}
    owners: list[Tensor] = []
    lengths = [len(encoded[index].ids) for index in chosen]
    for batch in batches(lengths, max_rows=max_rows, max_tokens=max_tokens):
        indices = [chosen[i] for i in batch]
        rows = [encoded[index] for index in indices]
        ids, mask = pad_right([row.ids for row in rows], pad_id, model.device)
        weights = _weights(rows, ids.shape[1], pool).to(ids.device)
        picked = weights > 0
        for site, hidden in _forward(model, sites, ids, mask).items():
            hidden = hidden.float()
            kept = hidden[picked] if pool is Pool.TOKENS else torch.einsum("btd,bt->bd", hidden, weights)
            values[site].append(kept.cpu())
        owner = torch.tensor(indices)
        owners.append(owner.repeat_interleave(picked.sum(1).cpu()) if pool is Pool.TOKENS else owner)
        advance(len(batch))
    return row_tensors({site: torch.cat(parts) for site, parts in values.items()}, torch.cat(owners))


def _weights(rows: Sequence[Encoded], width: int, pool: Pool) -> Tensor:
    """Float [rows, width]: the share of each position in its sample's row."""
    weights = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        if pool is Pool.LAST:
            weights[index, row.end] = 1
        elif pool is Pool.FIRST:
            weights[index, row.start] = 1
        else:
            end = max(row.end, row.start + 1)
            weights[index, row.start : end] = 1 / (end - row.start)
    return weights


class _AllSeen(Exception):
    """Every site was read: the rest of the forward pass is not needed."""


@torch.no_grad()
def _forward(model: Any, sites: Sequence[Site], ids: Tensor, mask: Tensor) -> dict[Site, Tensor]:
    """Hidden states [batch, time, D] at each site."""
    with _reading(model, sites) as seen, suppress(_AllSeen):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return {site: seen[site].reshape(*ids.shape, -1) for site in sites}


@contextmanager
def _reading(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, value: Any) -> None:
        seen[site] = value[0] if isinstance(value, tuple) else value
        if len(seen) == len(set(sites)):
            raise _AllSeen

    def reader(site: Site) -> Callable[..., None]:
        def read_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            keep(site, args)

        def read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(site, output)

        return read_input if site_module(model, site)[1] == "input" else read_output

    handles = []
    try:
        for site in dict.fromkeys(sites):
            module, end = site_module(model, site)
            register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
            handles.append(register(reader(site)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
