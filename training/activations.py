"""Labelled activations: the artifact between a model and a fitted method."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steering.types import Site
from training.choices import Pool
from training.data.records import Sample, Split
from training.errors import ActivationError, FitError
from training.files import write_json, write_tensors

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Contrast:
    """Activations of one attribute at one site: positive [P, D] and negative [N, D], float32."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True, eq=False)
class Activations:
    """N rows of activations, per site float32 [N, D], with what is known of each row."""

    values: Mapping[Site, Tensor]
    attributes: tuple[str, ...]
    labels: Tensor  # bool [N]
    groups: tuple[str, ...]
    splits: tuple[Split | None, ...]
    samples: Tensor  # int64 [N]: index of the row's sample in what was extracted
    pool: Pool = Pool.MEAN
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.attributes)
        parts: dict[str, Any] = {"labels": self.labels, "groups": self.groups, "splits": self.splits}
        parts |= {"samples": self.samples} | {str(site): value for site, value in self.values.items()}
        for name, part in parts.items():
            if len(part) != count:
                raise ActivationError(f"Activations have {count} attributes but {len(part)} rows of {name}.")

    def __len__(self) -> int:
        return len(self.attributes)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes, in the order of their first row."""
        return tuple(dict.fromkeys(self.attributes))

    def rows(self, *, attribute: str | None = None, label: bool | None = None, split: Split | None = None) -> Tensor:
        """Indices (int64) of the rows that match everything given."""
        matches = (
            (attribute is None or name == attribute) and (split is None or part is split)
            for name, part in zip(self.attributes, self.splits, strict=True)
        )
        chosen = torch.tensor(list(matches), dtype=torch.bool)
        if label is not None:
            chosen &= self.labels == label
        return chosen.nonzero().flatten()

    def contrasts(
        self, site: Site, split: Split | None = None, attributes: Sequence[str] | None = None
    ) -> dict[str, Contrast]:
        """Per attribute, its activations at `site`. Raises FitError where a side of an attribute is empty."""
        if site not in self.values:
            raise FitError(
                f"No activations were extracted at site {site}; there are {', '.join(map(str, self.sites))}."
            )
        values, found = self.values[site], {}
        for name in attributes or self.names:
            positive, negative = (self.rows(attribute=name, label=label, split=split) for label in (True, False))
            if not (len(positive) and len(negative)):
                raise FitError(
                    f"Attribute {name!r} has {len(positive)} positive and {len(negative)} negative activations "
                    f"in {split or 'all splits'}; it needs both."
                )
            found[name] = Contrast(values[positive], values[negative])
        return found


def row_tensors(values: Mapping[Site, Tensor], samples: Tensor) -> dict[str, Tensor]:
    """The content of one shard."""
    return {"samples": samples, **{str(site): value for site, value in values.items()}}


def write_manifest(
    folder: Path, *, plan: Mapping[str, Any], samples: Sequence[Sample], sites: Sequence[Site], shards: Sequence[str]
) -> None:
    """Written last: its presence means that the folder is complete."""
    rows = [
        {"attribute": s.attribute, "label": s.label, "group": s.group, "split": s.split and s.split.value}
        for s in samples
    ]
    manifest = {
        "format_version": FORMAT_VERSION,
        "plan": dict(plan),
        "sites": [str(site) for site in sites],
        "shards": list(shards),
        "samples": rows,
    }
    write_json(folder / MANIFEST, manifest)


def save_activations(activations: Activations, folder: Path) -> None:
    """Write one shard and the manifest."""
    by_index = {int(sample): row for row, sample in enumerate(activations.samples)}
    samples = [
        Sample(
            activations.attributes[row], "", "", bool(activations.labels[row]), activations.groups[row],
            activations.splits[row],
        )
        for _, row in sorted(by_index.items())
    ]  # fmt: skip
    renumbered = torch.searchsorted(torch.tensor(sorted(by_index)), activations.samples)
    write_tensors(folder / "shard-00000.safetensors", row_tensors(activations.values, renumbered))
    plan = {**activations.source, "pool": activations.pool.value}
    write_manifest(folder, plan=plan, samples=samples, sites=activations.sites, shards=["shard-00000.safetensors"])


def load_activations(folder: Path) -> Activations:
    """Read a complete folder. Raises ActivationError where it is missing, incomplete or broken."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ActivationError(f"{folder} holds no complete activations: {MANIFEST} is missing.") from None
    except (OSError, ValueError) as error:
        raise ActivationError(f"{folder / MANIFEST} cannot be read: {error}.") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ActivationError(f"{folder} has format_version {manifest.get('format_version')!r}, not {FORMAT_VERSION}.")
    samples = [
        Sample(row["attribute"], "", "", row["label"], row["group"], row["split"] and Split(row["split"]))
        for row in manifest["samples"]
    ]
    shards = [read_shard(folder / name) for name in manifest["shards"]]
    sites = [Site.parse(name) for name in manifest["sites"]]
    return join_shards(shards, samples, sites, Pool(manifest["plan"]["pool"]), manifest["plan"])


def read_shard(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ActivationError(f"{path} cannot be read: {error}.") from None


def join_shards(
    shards: Sequence[Mapping[str, Tensor]],
    samples: Sequence[Sample],
    sites: Sequence[Site],
    pool: Pool,
    source: Mapping[str, Any],
) -> Activations:
    """Rows of all shards in the order of the samples (and, within a sample, of its tokens)."""
    owner = torch.cat([shard["samples"] for shard in shards])
    order = torch.argsort(owner, stable=True)
    owner = owner[order]
    rows = [samples[index] for index in owner.tolist()]
    return Activations(
        values={site: torch.cat([shard[str(site)] for shard in shards])[order] for site in sites},
        attributes=tuple(row.attribute for row in rows),
        labels=torch.tensor([row.label for row in rows], dtype=torch.bool),
        groups=tuple(row.group for row in rows),
        splits=tuple(row.split for row in rows),
        samples=owner,
        pool=pool,
        source=dict(source),
    )
