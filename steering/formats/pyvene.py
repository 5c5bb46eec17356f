"""pyvene's folders (arXiv 2403.07809): `config.json`, and `intkey_KEY.bin` with the constant of each intervention.

Only what adds a constant to whole activations is a steering column: AdditionIntervention and SubtractionIntervention
with unit `pos`. `generate` of pyvene adds at every new token, as `positions: generated` does.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.checkpoint import Checkpoint
from steering.errors import FormatError
from steering.formats.foreign import (
    Foreign,
    Hints,
    constant_column,
    displacements,
    one_attribute,
    refuse_place,
)
from steering.formats.pickles import load_pickle, vector_of
from steering.formats.pyvene_names import COMPONENTS, KNOWN, file_of, find_file, site_of
from steering.types import Positions, Site

CONFIG = "config.json"
# The fields of pyvene's RepresentationConfig that matter here, in the order in which a list holds them.
FIELDS = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
)
SIGNS = {"AdditionIntervention": 1.0, "SubtractionIntervention": -1.0}
ADDITION = "<class 'pyvene.models.interventions.AdditionIntervention'>"


def read(path: Path, hints: Hints) -> Foreign:
    """One constant column an intervention, all of one attribute. Raises FormatError."""
    attribute = one_attribute(hints, path)
    if path.is_file():
        raise FormatError(f"{path} is a file; pyvene writes folders, with a {CONFIG} and intkey_*.bin")
    refuse_place(hints, path)
    unread = {file.name for file in path.glob("intkey_*.bin")}
    columns = []
    for fields in _interventions(path):
        where = f"{fields['component']} of layer {fields['layer']} in {path}"
        sign = _sign(fields, where)
        if (site := site_of(str(fields["component"]), fields["layer"])) is None:
            raise FormatError(f"{where} is at no site of ours: {', '.join(COMPONENTS.values())}, or a path to one")
        if (name := find_file(fields, unread)) is None:
            raise FormatError(f"{path} holds no intkey_*.bin with the constant for {where}")
        unread.remove(name)
        vector = sign * _source(path / name)
        if fields["dimension"] is not None:
            vector[fields["dimension"] :] = 0
        columns.append(constant_column(attribute, site, vector))
    if unread:
        raise FormatError(f"{path} holds {', '.join(sorted(unread))}, which its {CONFIG} does not name")
    return Foreign(tuple(columns), "pyvene", Positions.GENERATED)


def write(path: Path, checkpoint: Checkpoint, multipliers: Sequence[float]) -> None:
    """One addition a site: the sum of multiplier x vector over all attributes.

    Raises FormatError for a column that no constant addition is equal to, for an architecture whose modules pyvene has
    no names for, and for a folder that exists.
    """
    moved = displacements(checkpoint.columns, multipliers, "a pyvene addition")
    architecture = checkpoint.config.base_model.architecture
    if architecture not in KNOWN:
        raise FormatError(f"pyvene has no names for the modules of {architecture}; it has for {', '.join(KNOWN)}")
    if path.exists():
        raise FormatError(f"{path} exists already: choose another folder or delete it")
    config = {
        "representations": [_representation(site) for site in moved],
        "intervention_types": [ADDITION] * len(moved),
        "intervention_dimensions": [len(vector) for vector in moved.values()],
        "intervention_constant_sources": [True] * len(moved),
        "sorted_keys": [file_of(site).removeprefix("intkey_").removesuffix(".bin") for site in moved],
        "mode": "parallel",
        "model_type": architecture,
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for site, vector in moved.items():
            (partial / file_of(site)).write_bytes(_pickled({"source_representation": vector.float()}))
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {error}") from None


def _interventions(path: Path) -> list[dict[str, Any]]:
    """The fields of each intervention, with its `type` and its `dimension`: how much of the activation it changes."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path / CONFIG} cannot be read: {error}") from None
    listed = config.get("representations") if isinstance(config, dict) else None
    if not (isinstance(listed, list) and listed and all(isinstance(item, list | dict) for item in listed)):
        raise FormatError(f"{path / CONFIG} must list its representations, each a list or an object")
    types, dimensions = config.get("intervention_types"), config.get("intervention_dimensions")
    dimensions = dimensions or [None] * len(listed)
    for name, values in (("intervention_types", types), ("intervention_dimensions", dimensions)):
        if not (isinstance(values, list) and len(values) == len(listed)):
            raise FormatError(f"{name} in {path / CONFIG} must be a list of {len(listed)}, one for each representation")
    if strange := [size for size in dimensions if not (size is None or (isinstance(size, int) and size > 0))]:
        raise FormatError(f"intervention_dimensions in {path / CONFIG} must be whole numbers, not {strange[0]!r}")
    interventions = []
    for item, kind, dimension in zip(listed, types, dimensions, strict=True):
        fields = dict(zip(FIELDS, item, strict=False)) if isinstance(item, list) else dict(item)
        interventions.append({"layer": None, "component": None, **fields, "type": kind, "dimension": dimension})
    return interventions


def _sign(fields: Mapping[str, Any], where: str) -> float:
    name = str(fields["type"]).rpartition(".")[2].removesuffix("'>")
    if name not in SIGNS:
        raise FormatError(f"{where} is a {name}; only {' and '.join(SIGNS)} add a constant vector")
    if fields.get("unit", "pos") != "pos" or fields.get("subspace_partition") is not None:
        raise FormatError(f"{where} acts on a part of the activation: only unit 'pos' without subspaces is a column")
    return SIGNS[name]


def _source(path: Path) -> Tensor:
    state = load_pickle(path)
    if not isinstance(state, Mapping) or "source_representation" not in state:
        raise FormatError(f"{path} holds no source_representation")
    return vector_of(state["source_representation"], f"source_representation in {path}")


def _representation(site: Site) -> dict[str, Any]:
    return {
        "layer": site.layer,
        "component": COMPONENTS[site.kind],
        "unit": "pos",
        "max_number_of_units": 1,
        "hidden_source_representation": True,
    }


def _pickled(state: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
