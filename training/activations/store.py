"""Labelled activations: the artifact between a model and a fitted method, in memory and as a folder.

A folder holds safetensors shards and, written last, a manifest that says what their rows are.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steering.sites import site_module, site_width
from steering.types import Site
from training.activations import SINK, Pool
from training.activations.tokenization import Encoded
from training.data.samples import Sample, Split
from training.data.splits import split_samples
from training.errors import ActivationError, FitError
from training.files import write_json, write_tensors
from training.models import Base

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

# What saving a model changes, and what its weights say better.
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "transformers_version")
_THREADS = 4


def write_shard(path: Path, values: Mapping[Site, Tensor], samples: Tensor) -> None:
    """Rows [N, D] at each site, and the sample that each belongs to, int64 [N]."""
    write_tensors(path, {"samples": samples, **{str(site): value for site, value in values.items()}})


def shard_samples(path: Path) -> Tensor:
    """The sample of each row, int64 [N]; the activations stay on the disk. Raises ActivationError."""
    with _open_shard(path) as shard:
        owner: Tensor = shard.get_tensor("samples")
    return owner


def join_shards(paths: Sequence[Path], sites: Sequence[Site]) -> tuple[dict[Site, Tensor], Tensor]:
    """Rows [N, D] of all shards in the order of their samples (within a sample, of its tokens), and those samples [N].

    Beside the result, one site of one shard is in memory at a time. Raises ActivationError.
    """
    owners = [shard_samples(path) for path in paths]
    owner, order = torch.cat(owners).sort(stable=True)
    targets = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
    values: dict[Site, Tensor] = {}
    for path, own in zip(paths, torch.split(targets, [len(rows) for rows in owners]), strict=True):
        with _open_shard(path) as shard:
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
def _open_shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise ActivationError(f"{path} cannot be read: {error}.") from None


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
            found[name] = Contrast(*(values[side] for side in self.without_sinks(site, positive, negative)))
        return found

    def without_sinks(self, site: Site, *sides: Tensor) -> tuple[Tensor, ...]:
        """Each side's rows, given by their indices (int64), without attention sinks, where every token is a row: those
        with more than `SINK` times the median norm of all sides'. Raises FitError where a side has no others."""
        if self.pool is not Pool.TOKENS:
            return sides
        norms = [self.at(site)[side].norm(dim=1) for side in sides]
        most = SINK * torch.cat(norms).median()
        kept = tuple(side[own <= most] for side, own in zip(sides, norms, strict=True))
        if not all(map(len, kept)):
            raise FitError(
                f"A side has nothing but attention sinks at {site}, with more than {SINK:g} times the usual norm: give "
                "its texts a prompt, or take an earlier layer or another site."
            )
        return kept

    def of_rows(self, rows: Tensor) -> "Activations":
        """These rows (int64) alone."""
        listed = rows.tolist()
        return replace(
            self,
            values={site: values[rows] for site, values in self.values.items()},
            attributes=tuple(self.attributes[row] for row in listed),
            labels=self.labels[rows],
            groups=tuple(self.groups[row] for row in listed),
            splits=tuple(self.splits[row] for row in listed),
            samples=self.samples[rows],
        )


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
    return label_rows(values, owner, _manifest_samples(manifest), Pool(manifest["plan"]["pool"]), manifest["plan"])


def stored_samples(folder: Path) -> list[Sample]:
    """What is known of a folder's samples: all but their texts. Raises ActivationError."""
    return _manifest_samples(read_manifest(folder))


def stored_sites(folder: Path) -> list[Site]:
    """Where a folder's activations are from. Raises ActivationError."""
    return [Site.parse(name) for name in read_manifest(folder)["sites"]]


def stored_form(folder: Path) -> str | None:
    """The form of the texts, plain or chat; None where that is not known. Raises ActivationError."""
    form: str | None = read_manifest(folder)["plan"].get("form")
    return form


def _manifest_samples(manifest: Mapping[str, Any]) -> list[Sample]:
    return [
        Sample(row["attribute"], "", "", row["label"], row["group"], row["split"] and Split(row["split"]))
        for row in manifest["samples"]
    ]


def open_stored(folder: Path, base: Base, sites: Sequence[Site]) -> Activations:
    """Float32 [N, D] at `sites` alone.

    Raises ActivationError for a site that is not there, and for activations of another model; UnsupportedArchitecture
    for a site that the model does not have.
    """
    activations = load_activations(folder, sites)
    _check_model(folder, base, activations.source)
    for site, rows in activations.values.items():
        site_module(base.model, site)
        if rows.shape[1] != (width := site_width(base.model, site.kind)):
            raise ActivationError(
                f"{folder} holds {rows.shape[1]} numbers a row at {site}, but {base.id} has {width} there."
            )
    return activations


def describe_stored(folder: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the folder that it was fitted on. Raises ActivationError."""
    plan = read_manifest(folder)["plan"]
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return {"name": "activations", "path": str(folder), "loader": "activations", "sha256": digest, "plan": plan}


def split_as_stored(texts: Sequence[Sample], stored: Sequence[Sample], *, seed: int) -> list[Sample]:
    """Texts in the splits of their groups' activations. Groups without any are test where the activations have none of
    test, as those that `train` and `sweep` extract; else they are split by `seed`, with a warning."""
    known = {sample.group: sample.split for sample in stored if sample.split is not None}
    others = {text.group for text in texts} - known.keys()
    if known and Split.TEST not in known.values():
        known |= dict.fromkeys(others, Split.TEST)
    elif others:
        log.warning("%d groups of the data have no stored activations: they are split by seed %d.", len(others), seed)
    return split_samples(texts, seed=seed, known=known)


def _check_model(folder: Path, base: Base, plan: Mapping[str, Any]) -> None:
    """An extraction knows the weights that it ran; imported features only have the name that the user gave them."""
    if "features" in plan:
        if plan["model"] != base.id:
            log.warning("%s holds features of %s; the checkpoint will be one for %s.", folder, plan["model"], base.id)
    elif plan["model"] != model_hash(base.model):
        raise ActivationError(
            f"{folder} was extracted from another model than {base.id}, another revision of it, or in another dtype."
        )


def model_hash(model: Any) -> str:
    """Of the configuration and of every weight, with its name, shape and dtype; where the model came from does not
    matter."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(_THREADS) as threads:
        for weight in threads.map(_weight_hash, *zip(*model.named_parameters(), strict=True)):
            digest.update(weight)
    return digest.hexdigest()


def texts_hash(encoded: Sequence[Encoded]) -> str:
    """Of the tokens and of where the answers are in them."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(f"{row.start} {row.end} {row.ids}\n".encode())
    return digest.hexdigest()


def samples_hash(samples: Sequence[Sample]) -> str:
    """Of all that is known of the samples, labels and splits included."""
    return hashlib.sha256(json.dumps([sample.as_dict() for sample in samples]).encode()).hexdigest()


def _weight_hash(name: str, weight: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
