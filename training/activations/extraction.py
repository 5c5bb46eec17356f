"""Activations of labelled samples from a Hugging Face model: any layers and sites in one pass, resumable by shard.

1. work      the tokens, and hashes of all that decides their activations   plan.json
2. shards    samples of similar length, a file as soon as they are done     shard-00000.safetensors, ...
3. manifest  written last: labels, groups and splits of the samples         manifest.json

`accelerate launch -m training extract ...` (without GPUs: `torchrun --nproc-per-node 2 -m training extract ...`) starts
several processes, on one machine or many, that divide the shards; all of them have to see the same folder.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from steering.types import Site
from training.activations.artifact import Activations, label_rows, load_activations
from training.activations.shards import MANIFEST, read_manifest, shard_samples, write_manifest, write_shard
from training.activations.work import Work
from training.choices import Pool
from training.data.samples import Sample
from training.errors import ActivationError
from training.files import content_key, write_json
from training.processes import Processes, joined
from training.progress import Advance, progress_bar

log = logging.getLogger(__name__)

_SHARD_SIZE = 512
_MAX_TOKENS = 8192


def extract(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    pool: Pool = Pool.MEAN,
    out: Path | None = None,
    max_rows: int = 64,
    max_tokens: int = _MAX_TOKENS,
    shard_size: int = _SHARD_SIZE,
    progress: bool = False,
) -> Activations:
    """Run every sample once and keep float32 activations [N, D] at each site, pooled as `pool` says.

    With `out`, they are written there by `extract_to` and read back. Raises DataError without samples, ActivationError
    when `out` belongs to a different extraction.
    """
    work = Work.of(model, tokenizer, samples, sites, pool, max_rows, max_tokens)
    if out is not None:
        _store(work, out, shard_size, progress)
        return load_activations(out)
    with progress_bar("extract", len(samples), "samples", shown=progress) as advance:
        values, owner = work.run(range(len(samples)), advance)
    return label_rows(values, owner, samples, pool, work.source)


def extract_to(
    out: Path,
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    *,
    pool: Pool = Pool.MEAN,
    max_rows: int = 64,
    max_tokens: int = _MAX_TOKENS,
    shard_size: int = _SHARD_SIZE,
    progress: bool = False,
) -> int:
    """`extract` into a folder that `load_activations` reads; the number of rows. Memory: one shard of `shard_size`
    samples. Shards that an earlier call, or another process of this one, has finished are not computed again."""
    work = Work.of(model, tokenizer, samples, sites, pool, max_rows, max_tokens)
    return _store(work, out, shard_size, progress)


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
    work = Work.of(model, tokenizer, samples, sites, pool, max_rows, _MAX_TOKENS)
    out = folder / f"activations-{content_key(work.plan)}"
    _store(work, out, _SHARD_SIZE, progress)
    return load_activations(out)


def _store(work: Work, out: Path, shard_size: int, progress: bool) -> int:
    """Compute what is missing in `out`; the number of rows."""
    processes = joined(cpu=work.device.type == "cpu")
    _claim(out, work.plan, processes)
    shards = dict(_divide(work.order, shard_size))
    stored = _stored(out)
    pending = [] if stored else [name for name, chosen in shards.items() if not _is_done(out / name, chosen)]
    processes.wait()  # all know what is pending before anything is written
    # The longest texts first: what does not fit into memory fails at once, and the last shards are the quickest.
    own = pending[::-1][processes.index :: processes.count]
    left = sum(len(shards[name]) for name in own)
    total = len(work.samples) if processes.count == 1 else left
    with progress_bar("extract", total, "samples", shown=progress and processes.main, done=total - left) as advance:
        for name in own:
            _write(work, out / name, shards[name], advance)
    processes.wait()
    names = stored or list(shards)
    if processes.main:
        _finish(work, out, names)
    processes.wait()
    return sum(len(shard_samples(out / name)) for name in names)


def _write(work: Work, path: Path, chosen: Sequence[int], advance: Advance) -> None:
    values, owner = work.run(chosen, advance)
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


def _stored(out: Path) -> list[str]:
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


def _finish(work: Work, out: Path, names: Sequence[str]) -> None:
    """The manifest, last: again where only labels, groups or splits have changed."""
    if missing := [name for name in names if not (out / name).exists()]:
        raise ActivationError(f"{out / missing[0]} is missing: all processes must see the same folder.")
    if not (out / MANIFEST).exists() or read_manifest(out)["plan"] != work.source:
        write_manifest(out, plan=work.source, samples=work.samples, sites=work.sites, shards=names)
