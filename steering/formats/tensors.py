"""Vectors in the forms in which people keep them: constant columns, added at the sites that names and options give.

A bare tensor [width]; a stack [layers, width]; `{"vector": .., "layer": ..}`; names of layers -> tensors
(`steering/formats/names.py`); a dict of these by attribute. From PyTorch, NumPy, safetensors or JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.column import Column
from steering.errors import FormatError
from steering.formats.contents import read_contents
from steering.formats.foreign import (
    Counting,
    Foreign,
    Hints,
    constant_column,
    named_layers,
    need_layer,
    need_site,
    one_attribute,
)
from steering.formats.names import Place, hidden_state, numbered, place_of
from steering.types import Positions, Site, SiteKind

LAYER = ("layer", "layer_idx", "layer_index", "layer_id", "layers")
HOOK = ("hook_point", "hook_name", "module")  # whose value is a name as in `names.py`
VECTOR = ("vector", "vectors", "direction", "directions", "steering_vector", "steering_vectors", "control_vector")
SITE = "most are of residual; the published difference of ITI acts on attn_output"


@dataclass(frozen=True)
class _Parts:
    """The entries of a dict."""

    placed: dict[str, tuple[Place, Tensor]] = field(default_factory=dict)
    bare: dict[str, Tensor] = field(default_factory=dict)  # tensors whose names say no layer
    groups: dict[str, "_Parts"] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)  # what is no tensor
    names: tuple[str, ...] = ()


def read(path: Path, hints: Hints) -> Foreign:
    """One constant column a layer and attribute. Raises FormatError, also where layer or site must be named."""
    content, header = read_contents(path)
    reader = _Reader(path, hints)
    named = content if isinstance(content, Mapping) else {"": _tensor(content, str(path))}
    if "" in named and not _is_tensor(named[""]):
        raise FormatError(f"{path} holds one number, not a vector [width] or a stack [layers, width]")
    columns, said = reader.mapping(named, header)
    _check_apart(columns, path)
    notes = [*reader.notes]
    if said:
        listed = ", ".join(f"{name} {value!r}" for name, value in said.items())
        notes.append(f"kept in config.json, and not applied: {listed}"[:400])
    columns.sort(key=lambda column: (column.attribute, column.site))
    source = {"said": said} if said else {}
    return Foreign(tuple(columns), "vectors", Positions.GENERATED, source, notes=tuple(notes))


class _Reader:
    """Columns of what one file holds; `notes` of what is left out."""

    def __init__(self, path: Path, hints: Hints) -> None:
        self._path = path
        self._hints = hints
        self.notes: list[str] = []

    def mapping(self, content: Mapping[Any, Any], header: Mapping[str, str]) -> tuple[list[Column], dict[str, Any]]:
        """The columns of a dict, and what else it says."""
        parts = self._parts(content, {name: value for name, value in header.items() if name != "format"})
        labels, hints = self._labels(parts.said)
        chosen = self._chosen(parts)
        columns: list[Column] = []
        for attribute, part in chosen.items():
            if part.placed:
                columns += self._named(part, attribute)
            else:
                ((name, tensor),) = part.bare.items()
                columns += self._bare(name, tensor, attribute, labels, hints)
        return columns, {name: value for name, value in parts.said.items() if name not in (*LAYER, *HOOK, "site")}

    def _parts(self, content: Mapping[Any, Any], said: Mapping[str, Any] | None = None) -> _Parts:
        parts = _Parts(said=dict(said or {}), names=tuple(map(str, content)))
        for key, value in content.items():
            name, where = str(key), f"{key} in {self._path}"
            if isinstance(value, Mapping):
                parts.groups[name] = self._parts(value)
            elif name in LAYER or not _is_tensor(value):
                parts.said[name] = _plain(value)
            elif place := self._place(name):
                parts.placed[name] = place, self._vector(_tensor(value, where), where, place.site)
            else:
                parts.bare[name] = _tensor(value, where)
        return parts

    def _place(self, name: str) -> Place | None:
        try:
            return place_of(name, self._hints)
        except FormatError as error:
            raise FormatError(f"{self._path}: {error}") from None

    def _labels(self, said: Mapping[str, Any]) -> tuple[list[Place] | None, Hints]:
        """The places that `layer` or `hook_point` beside a vector name, and the hints with the site that is said."""
        hints = self._hints
        if (site := said.get("site")) in tuple(SiteKind):
            if hints.site not in (None, site):
                raise FormatError(f"{self._path} says site {site}, not --site {hints.site}")
            hints = replace(hints, site=SiteKind(site))
        for label in HOOK:
            if isinstance(said.get(label), str) and (place := self._place(said[label])):
                return [place], hints
        for label in LAYER:
            if label in said:
                value = said[label]
                numbers = value if isinstance(value, list) else [value]
                if not numbers or not all(_is_whole(number) for number in numbers):
                    raise FormatError(
                        f"{label} in {self._path} must be a whole number, or a list of them, not {value!r}"
                    )
                return [numbered(f"{label} {number}", int(number), hints) for number in numbers], hints
        return None, hints

    def _chosen(self, parts: _Parts) -> dict[str, _Parts]:
        """Attribute -> the entries that are its own."""
        wanted = self._hints.attributes
        groups = {name: group for name, group in parts.groups.items() if group.placed}
        if parts.placed:
            self._leave_out({**parts.bare, **parts.groups})
            return {one_attribute(self._hints, self._path): parts}
        pool = {**groups, **{name: _Parts(bare={name: tensor}) for name, tensor in parts.bare.items()}}
        if wanted and all(name in pool for name in wanted):
            self._leave_out([name for name in (*parts.groups, *parts.bare) if name not in wanted])
            return {name: pool[name] for name in wanted}
        named = [name for name in pool if name in VECTOR]
        chosen = list(pool) if len(pool) == 1 else named
        if len(chosen) != 1:
            listed = ", ".join(pool) or ", ".join(parts.names) or "nothing"
            raise FormatError(
                f"{self._path} holds {listed}: none of them names a layer (as layer_14, model.layers.14 or "
                "blocks.14.hook_resid_post do)" + (": choose with --attribute NAME" if pool else "")
            )
        self._leave_out([name for name in (*parts.groups, *parts.bare) if name != chosen[0]])
        only = pool[chosen[0]]
        if len(wanted) > 1 and (rows := only.bare.get(chosen[0])) is not None and rows.shape[:-1] == (len(wanted),):
            # As many attributes as rows: one place, a vector for each.
            return {name: _Parts(bare={chosen[0]: row}) for name, row in zip(wanted, rows, strict=True)}
        return {one_attribute(self._hints, self._path): only}

    def _leave_out(self, names: Sequence[str] | Mapping[str, Any]) -> None:
        if names:
            self.notes.append(f"left out: {', '.join(names)}")

    def _named(self, parts: _Parts, attribute: str) -> list[Column]:
        found = {name: entry for name, entry in parts.placed.items() if not entry[0].outside}
        outside = [place.outside for place, _ in parts.placed.values() if place.outside]
        if not found:
            raise FormatError(f"{self._path}: {'; '.join(filter(None, outside))}")
        self.notes += [f"left out: {why}" for why in outside]
        wanted, there = self._hints.layers, {place.layer for place, _ in found.values()}
        if missing := [layer for layer in wanted if layer not in there]:
            names = ", ".join(f"{place.layer} ({place.name})" for place, _ in found.values())
            raise FormatError(f"{self._path} holds no vector for layer {named_layers(missing)}; it has {names}"[:600])
        return [
            self._column(attribute, place, vector)
            for place, vector in found.values()
            if not wanted or place.layer in wanted
        ]

    def _bare(
        self, name: str, tensor: Tensor, attribute: str, labels: list[Place] | None, hints: Hints
    ) -> list[Column]:
        where = f"{name} in {self._path}" if name else str(self._path)
        site = labels[0].site if labels and labels[0].site else hints.site
        tensor = self._flat(tensor, where, site)
        if labels and hints.layers and sorted(hints.layers) != sorted(place.layer for place in labels):
            said = ", ".join(f"{place.name} (block {place.layer})" for place in labels)
            raise FormatError(f"{self._path} says {said}, not --layer {named_layers(hints.layers)}")
        if tensor.dim() == 1:
            if labels and len(labels) > 1:
                raise FormatError(f"{where} is one vector, but {len(labels)} layers are named beside it")
            place = labels[0] if labels else Place(name, need_layer(hints, self._path), hints.site)
            if place.outside:
                raise FormatError(f"{self._path}: {place.outside}")
            return [self._column(attribute, replace(place, site=place.site or hints.site), tensor)]
        places = labels if labels and len(labels) == len(tensor) else self._rows(tensor, where, hints)
        placed = {f"{index}": (place, row) for index, (place, row) in enumerate(zip(places, tensor, strict=True))}
        return self._named(_Parts(placed=placed), attribute)

    def _rows(self, tensor: Tensor, where: str, hints: Hints) -> list[Place]:
        """The place of each row of a stack."""
        rows, model = len(tensor), hints.model
        if len(hints.layers) == rows and hints.counting is None:
            return [Place(f"row {index}", layer, hints.site) for index, layer in enumerate(hints.layers)]
        if model is not None and rows == model.num_layers and hints.counting is not Counting.HIDDEN_STATES:
            return [Place(f"row {index}", index, hints.site) for index in range(rows)]
        if model is not None and rows == model.num_layers + 1 and hints.counting is not Counting.BLOCKS:
            return [hidden_state(f"row {index}", index, hints) for index in range(rows)]
        has = f" and the model has {model.num_layers} layers" if model else ""
        raise FormatError(
            f"{where} holds {rows} vectors of {tensor.shape[1]} numbers,{has or ' for layers that it does not say'}: "
            f"name the layer of each row, as in --layer 10-{9 + rows}; a row for every layer, or one more (for the "
            "embedding, as Hugging Face's hidden_states have it), needs no --layer"
        )

    def _column(self, attribute: str, place: Place, vector: Tensor) -> Column:
        site = place.site or need_site(self._hints, self._path, SITE)
        where = f"{place.name} in {self._path}" if place.name else str(self._path)
        vector = self._vector(vector, where, site)
        wrong = int((~torch.isfinite(vector)).sum())
        if wrong:
            raise FormatError(f"{where} holds {wrong} values of {len(vector)} that are not finite (NaN or infinite)")
        return constant_column(attribute, Site(place.layer, site), vector)

    def _vector(self, tensor: Tensor, where: str, site: SiteKind | None) -> Tensor:
        """One vector [width], of a tensor that may have dimensions of 1, or heads, in front."""
        flat = self._flat(tensor, where, site)
        if flat.dim() != 1:
            raise FormatError(f"{where} must be a vector, not of shape {list(tensor.shape)}")
        return flat

    def _flat(self, tensor: Tensor, where: str, site: SiteKind | None) -> Tensor:
        """Float32 [width] or [rows, width]: without dimensions of 1 in front of the last, with heads side by side."""
        shape = list(tensor.shape)
        if not shape or tensor.numel() == 0:
            raise FormatError(f"{where} must be a vector [width] or a stack [layers, width], not of shape {shape}")
        heads = self._hints.model.heads_width if self._hints.model and site is SiteKind.ATTN_HEADS else None
        if len(shape) >= 2 and shape[-1] != heads and shape[-2] * shape[-1] == heads:
            tensor = tensor.reshape(*shape[:-2], heads)
        shape = [size for size in tensor.shape[:-1] if size != 1] + [tensor.shape[-1]]
        if len(shape) > 2:
            raise FormatError(
                f"{where} must be a vector [width] or a stack [layers, width], not of shape {list(tensor.shape)}"
            )
        return tensor.float().reshape(shape)


def _check_apart(columns: Sequence[Column], path: Path) -> None:
    places = [(column.attribute, column.site) for column in columns]
    for attribute, site in places:
        if places.count((attribute, site)) > 1:
            raise FormatError(f"{path} holds two vectors of {attribute!r} for {site}")


def _is_tensor(value: object) -> bool:
    """Whether a value of a dict is a tensor, an array or a list of numbers, and so a vector or several."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], float | int | list | tuple | Tensor)


def _tensor(value: object, where: str) -> Tensor:
    """A tensor of floating-point numbers. Raises FormatError."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            raise FormatError(f"{where} must be floating-point numbers, not {value.dtype}")
        native = np.float64 if value.dtype.itemsize > 8 else value.dtype.newbyteorder("=")
        return torch.from_numpy(value.astype(native))
    if isinstance(value, list | tuple):
        if value and all(isinstance(part, Tensor) for part in value):
            shapes = {tuple(part.shape) for part in value}
            if len(shapes) > 1:
                raise FormatError(f"{where} is a list of tensors of several shapes: {sorted(shapes)}")
            value = torch.stack([part.detach() for part in value])
        else:
            try:
                return torch.tensor(value, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise FormatError(f"{where} is no list of numbers, or lists of them of one length: {error}") from None
    if not isinstance(value, Tensor):
        raise FormatError(f"{where} holds no vectors, but {_article(value)}")
    if not value.dtype.is_floating_point:
        raise FormatError(f"{where} must be floating-point numbers, not {str(value.dtype).removeprefix('torch.')}")
    if value.layout is not torch.strided:
        value = value.to_dense()
    return value.detach()


def _article(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _is_whole(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, str) and value.removeprefix("-").isdecimal()
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it; what JSON lacks as text."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
