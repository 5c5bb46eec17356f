"""What a method of training is: a name, a config, a fit function, and what it does unless told otherwise.

A method is one file that makes one `Method`, and one entry of `METHODS` (`training/methods/__init__.py`). The fields of
its config that are made by `option` are options of `matsteer train` and `sweep`. A command line lists them at once, so
a method's file imports torch, and what needs it, inside its functions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum, StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.activations import Pool
from training.errors import TrainingError

if TYPE_CHECKING:
    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Activations
    from training.data.samples import Sample
    from training.models import Base


class Direction(StrEnum):
    """Along what a vector points, where a method offers a choice."""

    MEAN = "mean"
    """The difference of the two sides' means."""
    PROBE = "probe"
    """The weights of a logistic probe of positive against negative."""
    PCA = "pca"
    """The first principal component of the groups' differences."""


@dataclass(frozen=True)
class Option:
    """How a field of a config is given on a command line. Options of one name in several methods are one option."""

    help: str
    type: Any = None
    """What the command line takes, where it is not the field's own type."""
    parse: Callable[[Any], Any] | None = None
    """From what was given to the field's value. Raises TrainingError that names the option."""
    metavar: str | None = None
    min: float | None = None


def option(
    help: str,
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    type: Any = None,
    parse: Callable[[Any], Any] | None = None,
    metavar: str | None = None,
    min: float | None = None,
) -> Any:
    """A field of a config that is also an option, --NAME with dashes."""
    metadata = {"option": Option(help, type, parse, metavar, min)}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MethodConfig:
    """Base of the settings of a method."""

    def as_dict(self) -> dict[str, Any]:
        """The settings in JSON's own types, as a checkpoint keeps them."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}

    def named_sites(self) -> tuple["Site", ...]:
        """The sites that the settings name: where the method acts when no layer is given."""
        return ()

    def extra_sites(self) -> tuple["Site", ...]:
        """Sites whose activations are needed although the method does not act there."""
        return ()

    def conditions(self) -> tuple[str, ...]:
        """Attributes of the data that say when to steer, and get no columns of their own."""
        return ()

    def own_samples(self) -> list["Sample"]:
        """The texts that are fitted on in place of data."""
        return []


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What a method is fitted on. Only the train split counts; dev may choose among epochs."""

    activations: "Activations"
    sites: Mapping[str, Sequence["Site"]]
    """Attribute -> where it gets columns."""
    keep_norm: bool
    """Of the columns: whether steering keeps the activation's norm."""
    folder: Path | None = None
    """For what a fit needs to resume, and what it found out."""
    device: str = "cpu"
    progress: bool = False
    base: "Base | None" = None
    """The model and its tokenizer, for a method that is trained through the model."""
    samples: Sequence["Sample"] = ()
    """The texts of the activations, likewise."""

    def by_site(self) -> Iterator[tuple["Site", list[str]]]:
        """Every site once, with the attributes that get columns there."""
        for site in dict.fromkeys(site for sites in self.sites.values() for site in sites):
            yield site, [name for name, sites in self.sites.items() if site in sites]

    def by_attribute(self) -> Iterator[tuple[str, Sequence["Site"]]]:
        """Every attribute that gets columns, with their sites."""
        return ((name, sites) for name, sites in self.sites.items() if sites)


@dataclass(frozen=True)
class Preset:
    """Settings that a flag puts in place of the defaults."""

    config: MethodConfig
    help: str


@dataclass(frozen=True)
class Method:
    name: str
    """As after --method, and in a checkpoint."""
    summary: str
    """For --help."""
    title: str
    """For model cards, with the paper."""
    config: type[MethodConfig]
    fit: Callable[[FitInputs, Any], Sequence["Column"]]
    """(inputs, config) -> columns. Raises FitError."""
    site: str = "attn_output"
    """The kind of site that is meant when none is given."""
    pool: Pool = Pool.MEAN
    keep_norm: bool | None = False
    """Whether the activation's norm is kept, unless told otherwise; None: it cannot be."""
    multiplier: float = 1.0
    """The default multiplier of the columns."""
    contrastive: bool = True
    """Whether both sides of every attribute are needed."""
    fitted_on: str | None = None
    """What is fitted on in place of data, in words; None: data."""
    through_model: bool = False
    """Whether the model itself and the texts are needed, so that stored activations are not enough."""
    one_place: bool = True
    """Whether it acts at one site at a time, so that a good one can be looked for."""
    layer_options: tuple[str, ...] = ()
    """Options that name layers, which a sweep cannot take: it fits one layer at a time."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    panel: str = "Other methods"
    """Of --help."""

    def options(self) -> dict[str, tuple[Field[Any], Option]]:
        """Field name -> field and option."""
        return {one.name: (one, one.metadata["option"]) for one in fields(self.config) if "option" in one.metadata}

    def configure(self, given: Mapping[str, Any], *, seed: int = 0) -> MethodConfig:
        """The config of options that were given, by their field names; None and [] stand for nothing.

        `seed` goes to a config that has one. Raises TrainingError.
        """
        values: dict[str, Any] = {}
        for name, preset in self.presets.items():
            if given.get(name):
                values |= {one.name: getattr(preset.config, one.name) for one in fields(preset.config)}
        if "seed" in self.config.__dataclass_fields__:
            values["seed"] = seed
        for name, (_, spec) in self.options().items():
            if (value := given.get(name)) not in (None, []):
                values[name] = spec.parse(value) if spec.parse else value
        return self.config(**values)


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises TrainingError."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(isfinite(number) for number in numbers):
        raise TrainingError(f"{option} must be finite numbers separated by commas, got {text!r}.")
    return numbers


def parse_settings(items: Sequence[str] | None, option: str, *, unnamed: bool = False) -> dict[str, float]:
    """ "NAME=NUMBER" items; with `unnamed` also a bare number, under the name "". Raises TrainingError."""
    settings = {}
    for item in items or ():
        name, found, number = item.rpartition("=")
        if (not name.strip() and found) or not (found or unnamed):
            raise TrainingError(f"{option} must be NAME=NUMBER, got {item!r}.")
        try:
            (settings[name.strip()],) = parse_numbers(number, option)
        except ValueError:  # no number, or several
            raise TrainingError(f"{option} must be NAME=NUMBER with one finite number, got {item!r}.") from None
    return settings
