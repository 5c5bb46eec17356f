"""A folder of stored activations: safetensors shards, and a manifest that says what their rows are."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steering.types import Site
from training.data.samples import Sample
from training.errors import ActivationError
from training.files import write_json, write_tensors

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def write_shard(path: Path, values: Mapping[Site, Tensor], samples: Tensor) -> None:
    """Rows [N, D] at each site, and the sample that each belongs to, int64 [N]."""
    write_tensors(path, {"samples": samples, **{str(site): value for site, value in values.items()}})


def shard_samples(path: Path) -> Tensor:
    """The sample of each row, int64 [N]; the activations stay on the disk. Raises ActivationError."""
    with _opened(path) as shard:
        owner: Tensor = shard.get_tensor("samples")
    return owner


def join_shards(paths: Sequence[Path], sites: Sequence[Site]) -> tuple[dict[Site, Tensor], Tensor]:
    """Rows [N, D] of all shards in the order of their samples (within a sample, of its tokens), and those samples [N].

    Beside the result, one site of one shard is in memory at a time. Raises ActivationError.
    """
    owners = [shard_samples(path) for path in paths]
    owner, order = torch.cat(owners).sort(stable=True)
    places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    values: dict[Site, Tensor] = {}
    for path, own in zip(paths, torch.split(places, [len(rows) for rows in owners]), strict=True):
        with _opened(path) as shard:
            for site in sites:
                rows = shard.get_tensor(str(site))
                if site not in values:
                    values[site] = torch.empty(len(owner), rows.shape[1])
                values[site].index_copy_(0, own, rows)
    return values, owner


def write_manifest(
    folder: Path, *, plan: Mapping[str, Any], samples: Sequence[Sample], sites: Sequence[Site], shards: Sequence[str]
) -> None:
    """Written last: its presence means that the folder is complete."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": dict(plan),
        "sites": [str(site) for site in sites],
        "shards": list(shards),
        "samples": [
            {"attribute": s.attribute, "label": s.label, "group": s.group, "split": s.split and s.split.value}
            for s in samples
        ],
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ActivationError where it is missing, broken or of another format."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ActivationError(f"{folder} holds no complete activations: {MANIFEST} is missing.") from None
    except (OSError, ValueError) as error:
        raise ActivationError(f"{folder / MANIFEST} cannot be read: {error}.") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ActivationError(f"{folder} has format_version {manifest.get('format_version')!r}, not {FORMAT_VERSION}.")
    return manifest


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise ActivationError(f"{path} cannot be read: {error}.") from None
