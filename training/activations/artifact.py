"""Labelled activations: the artifact between a model and a fitted method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.types import Site
from training.activations.shards import join_shards, read_manifest, write_manifest, write_shard
from training.choices import Pool
from training.data.samples import Sample, Split
from training.errors import ActivationError, FitError


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

    def at(self, site: Site) -> Tensor:
        """Float32 [N, D]. Raises FitError for a site that was not extracted."""
        if site not in self.values:
            raise FitError(
                f"No activations were extracted at site {site}; there are {', '.join(map(str, self.sites))}."
            )
        return self.values[site]

    def head_width(self, site: Site) -> int:
        """d of the heads that lie side by side at an attn_heads site. Raises FitError where it is not known."""
        count, width = self.source.get("heads"), self.at(site).shape[1]
        if not isinstance(count, int) or count < 1 or width % count:
            raise FitError(f"These activations do not say how many heads share the {width} dimensions of site {site}.")
        return width // count

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
        values, found = self.at(site), {}
        for name in attributes or self.names:
            positive, negative = (self.rows(attribute=name, label=label, split=split) for label in (True, False))
            if not (len(positive) and len(negative)):
                groups = len({self.groups[row] for row in self.rows(attribute=name).tolist()})
                raise FitError(
                    f"Attribute {name!r} has {len(positive)} positive and {len(negative)} negative activations "
                    f"in {split or 'all splits'}; it needs both. Its rows are of {groups} "
                    f"group{'s' if groups != 1 else ''}, and a group is in one split."
                )
            found[name] = Contrast(values[positive], values[negative])
        return found


def label_rows(
    values: Mapping[Site, Tensor], owner: Tensor, samples: Sequence[Sample], pool: Pool, source: Mapping[str, Any]
) -> Activations:
    """Activations whose row i, at each site, belongs to samples[owner[i]]."""
    rows = [samples[index] for index in owner.tolist()]
    return Activations(
        values=values,
        attributes=tuple(row.attribute for row in rows),
        labels=torch.tensor([row.label for row in rows], dtype=torch.bool),
        groups=tuple(row.group for row in rows),
        splits=tuple(row.split for row in rows),
        samples=owner,
        pool=pool,
        source=dict(source),
    )


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
    shard = folder / "shard-00000.safetensors"
    write_shard(shard, activations.values, renumbered)
    plan = {**activations.source, "pool": activations.pool.value}
    write_manifest(folder, plan=plan, samples=samples, sites=activations.sites, shards=[shard.name])


def load_activations(folder: Path, sites: Sequence[Site] | None = None) -> Activations:
    """Read a complete folder, at `sites` alone where given. Raises ActivationError where it is missing, incomplete or
    broken, or has not got a site."""
    manifest = read_manifest(folder)
    stored = [Site.parse(name) for name in manifest["sites"]]
    if missing := [site for site in sites or () if site not in stored]:
        raise ActivationError(f"{folder} has no activations at {missing[0]}; it has {', '.join(map(str, stored))}.")
    values, owner = join_shards([folder / name for name in manifest["shards"]], stored if sites is None else sites)
    return label_rows(values, owner, _samples(manifest), Pool(manifest["plan"]["pool"]), manifest["plan"])


def stored_samples(folder: Path) -> list[Sample]:
    """What is known of a folder's samples: all but their texts. Raises ActivationError."""
    return _samples(read_manifest(folder))


def _samples(manifest: Mapping[str, Any]) -> list[Sample]:
    return [
        Sample(row["attribute"], "", "", row["label"], row["group"], row["split"] and Split(row["split"]))
        for row in manifest["samples"]
    ]
