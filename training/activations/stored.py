"""Activations that `matsteer extract` or `import-features` wrote, taken in place of an extraction."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.sites import site_module, site_width
from steering.types import Site
from training.activations.artifact import Activations, load_activations
from training.activations.fingerprint import model_hash
from training.activations.shards import MANIFEST, read_manifest
from training.data.samples import Sample
from training.data.splits import split_samples
from training.errors import ActivationError
from training.models import Base

log = logging.getLogger(__name__)


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
    """Texts in the splits of their groups' activations; groups without any are split by `seed`, with a warning."""
    known = {sample.group: sample.split for sample in stored if sample.split is not None}
    if others := {text.group for text in texts} - known.keys():
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
