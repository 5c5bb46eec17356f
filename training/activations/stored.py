"""Activations that `matsteer extract` or `import-features` wrote, taken in place of an extraction."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering.sites import site_module, site_width
from steering.types import Site
from training.activations import Activations, label_rows
from training.choices import Pool
from training.data.records import Sample, Split
from training.data.splits import split_samples
from training.errors import ActivationError
from training.fingerprint import model_hash
from training.models import Base
from training.shards import MANIFEST, join_shards, read_manifest

log = logging.getLogger(__name__)


def stored_samples(folder: Path) -> list[Sample]:
    """What is known of the samples: all but their texts. Raises ActivationError."""
    return [
        Sample(row["attribute"], "", "", row["label"], row["group"], row["split"] and Split(row["split"]))
        for row in read_manifest(folder)["samples"]
    ]


def open_stored(folder: Path, base: Base, sites: Sequence[Site]) -> Activations:
    """Float32 [N, D] at `sites` alone.

    Raises ActivationError for a site that is not there, and for activations of another model; UnsupportedArchitecture
    for a site that the model does not have.
    """
    manifest = read_manifest(folder)
    if missing := [str(site) for site in sites if str(site) not in manifest["sites"]]:
        raise ActivationError(f"{folder} has no activations at {missing[0]}; it has {', '.join(manifest['sites'])}.")
    _check_model(folder, base, manifest["plan"])
    values, owner = join_shards([folder / name for name in manifest["shards"]], sites)
    for site, rows in values.items():
        site_module(base.model, site)
        if rows.shape[1] != (width := site_width(base.model, site.kind)):
            raise ActivationError(
                f"{folder} holds {rows.shape[1]} numbers a row at {site}, but {base.id} has {width} there."
            )
    return label_rows(values, owner, stored_samples(folder), Pool(manifest["plan"]["pool"]), manifest["plan"])


def describe_stored(folder: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the folder that it was fitted on. Raises ActivationError."""
    plan = read_manifest(folder)["plan"]
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return {"name": "activations", "path": str(folder), "loader": "activations", "sha256": digest, "plan": plan}


def split_as_stored(texts: Sequence[Sample], stored: Sequence[Sample], *, seed: int) -> list[Sample]:
    """Texts in the splits of their groups' activations; groups without any are split by `seed`, with a warning."""
    known = {sample.group: sample.split for sample in stored if sample.split is not None}
    if others := {text.group for text in texts} - known.keys():
        log.warning("%d groups of the data have no stored activations: they are split by seed %d.", len(others), seed)
    return split_samples(texts, seed=seed, known=known)


def _check_model(folder: Path, base: Base, plan: dict[str, Any]) -> None:
    """An extraction knows the weights that it ran; imported features only have the name that the user gave them."""
    if "features" in plan:
        if plan["model"] != base.id:
            log.warning("%s holds features of %s; the checkpoint will be one for %s.", folder, plan["model"], base.id)
    elif plan["model"] != model_hash(base.model):
        raise ActivationError(
            f"{folder} was extracted from another model than {base.id}, another revision of it, or in another dtype."
        )
