"""What `config.json` of a checkpoint folder holds."""

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from steering.errors import CheckpointError
from steering.types import Gate, Positions, SiteKind

if TYPE_CHECKING:  # a process without a model needs no PyTorch
    from steering.column import Column

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# What a config may hold: one of millions of values, or of as many unknown fields, takes seconds to read or to refuse.
MAX_VALUES, MAX_CONTAINERS = 2**20, 2**17  # numbers and the like; lists and objects
MAX_COLUMNS = 2**14
MAX_FIELDS = 64  # of an object with fields of its own
MAX_SENTENCE = 300  # characters

Name = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]


class Strict(BaseModel):
    """Refuses what it does not know, and does not convert."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BaseModelInfo(Strict):
    """The model that a checkpoint was trained on."""

    id: str
    revision: str | None
    architecture: str
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)


class ClampConfig(Strict):
    """What a column sets a projection to."""

    value: float
    origin: float = 0.0


class ReadingConfig(Strict):
    """What a column's gate reads, where that is not what the column steers."""

    layer: int = Field(ge=0)
    site: SiteKind
    latched: bool = False


class ColumnConfig(Strict):
    """One column, without its tensors."""

    attribute: str = Field(max_length=64)  # as a Column has it
    layer: int = Field(ge=0)
    site: SiteKind
    gate: Gate
    default_multiplier: float
    range: tuple[float, float]
    clamp: ClampConfig | None = None
    reads: ReadingConfig | None = None


class CheckpointConfig(Strict):
    """`config.json`."""

    format_version: Literal[1]
    name: Name
    version: Name
    method: str
    base_model: BaseModelInfo
    columns: list[ColumnConfig] = Field(min_length=1, max_length=MAX_COLUMNS, fail_fast=True)
    normalize: bool
    positions: Positions
    training: dict[str, Any]
    evaluation: dict[str, Any]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _one_default_per_attribute(self) -> Self:
        seen: dict[str, tuple[float, tuple[float, float]]] = {}
        for column in self.columns:
            settings = (column.default_multiplier, column.range)
            if seen.setdefault(column.attribute, settings) != settings:
                raise ValueError(f"attribute {column.attribute!r} has two default multipliers or ranges")
            if column.layer >= self.base_model.num_layers:
                raise ValueError(f"layer {column.layer} is beyond the {self.base_model.num_layers} of the base model")
            if column.reads and column.reads.latched and self.positions is not Positions.GENERATED:
                raise ValueError(
                    f"attribute {column.attribute!r} has a latched gate, which is known from the last prompt token on: "
                    f"positions must be generated, not {self.positions.value}"
                )
        return self


def describe(column: "Column") -> ColumnConfig:
    """A column without its tensors."""
    reads = column.reads
    return ColumnConfig(
        attribute=column.attribute,
        layer=column.site.layer,
        site=column.site.kind,
        gate=column.gate,
        default_multiplier=column.default_multiplier,
        range=column.range,
        clamp=ClampConfig(**asdict(column.clamp)) if column.clamp else None,
        reads=ReadingConfig(layer=reads.site.layer, site=reads.site.kind, latched=reads.latched) if reads else None,
    )


def plain(value: Any, where: str) -> Any:
    """`value` in JSON's own types; numbers that are not finite become None. Raises CheckpointError naming `where`."""
    if value is None or isinstance(value, bool | str | int):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist(), where)
    raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def parse(raw: bytes) -> CheckpointConfig:
    """What a config.json says. Raises CheckpointError with what comes after the file's name: "is not JSON: ..."."""
    # What of it stands in texts is counted, too: there is little.
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b",") > MAX_VALUES:
        raise CheckpointError(f"has more than {MAX_CONTAINERS} lists and objects, or more than {MAX_VALUES} values")
    try:
        fields = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}") from None
    if isinstance(fields, dict) and fields.get("format_version", 1) != 1:
        raise CheckpointError(f"has format_version {reprlib.repr(fields['format_version'])}; only 1 can be read")
    if any(isinstance(one, dict) and len(one) > MAX_FIELDS for one in _with_fields(fields)):
        raise CheckpointError(f"is refused: an object in it has more than {MAX_FIELDS} fields")
    try:
        return CheckpointConfig.model_validate_json(raw)
    except ValidationError as error:
        raise CheckpointError(f"is refused: {sentence(error)}") from None


def _with_fields(config: Any) -> Iterator[Any]:
    """The objects in a config whose fields are known."""
    yield config
    if isinstance(config, dict):
        yield config.get("base_model")
        columns = config.get("columns")
        for column in columns if isinstance(columns, list) else ():
            yield column
            if isinstance(column, dict):
                yield from (column.get("clamp"), column.get("reads"))


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return (f"{where}: {message}" if where else message)[:MAX_SENTENCE]
