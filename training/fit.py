"""One call for every method: extracted activations -> steering columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steering.types import Column, Site
from training.activations import Activations
from training.choices import Method
from training.data.records import Split
from training.errors import FitError
from training.methods.difference import fit_difference
from training.methods.mat import fit_mat
from training.methods.mat_config import MatConfig
from training.methods.probe import fit_probe


@dataclass(frozen=True)
class Recipe:
    """How columns are made from activations."""

    method: Method = Method.MAT
    mat: MatConfig = field(default_factory=MatConfig)
    penalty: float = 1.0
    """Of the probe's squared weights."""
    normalize: bool | None = None
    """Keep the activation's norm; None: as the method is published (MAT-Steer keeps it)."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Attribute -> factor on its vector, so that multiplier 1 means that strength; "" is for all others."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Attribute -> default multiplier, 1 where it is not named."""
    places: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    """Attribute -> the sites at which it is fitted, in place of the sites of the others."""

    @property
    def keep_norm(self) -> bool:
        return self.method is Method.MAT if self.normalize is None else self.normalize

    @property
    def own_sites(self) -> tuple[Site, ...]:
        """Those of attributes with places of their own, each once."""
        return tuple(dict.fromkeys(site for sites in self.places.values() for site in sites))

    def at(self, places: Mapping[str, tuple[Site, ...]]) -> "Recipe":
        """The same recipe with every attribute at its own places."""
        return replace(self, places=places)

    def settings(self) -> dict[str, Any]:
        """What decides the fit, in JSON's own types; strengths and defaults come after it."""
        own: dict[str, Any] = {"method": self.method.value, "normalize": self.keep_norm}
        own |= {f"place {name}": ", ".join(map(str, sites)) for name, sites in self.places.items()}
        if self.method is Method.MAT:
            own |= self.mat.as_dict() | {"normalize": self.keep_norm}
        if self.method is Method.PROBE:
            own["penalty"] = self.penalty
        return own

    def as_dict(self) -> dict[str, Any]:
        """Everything, in JSON's own types."""
        scaled = {f"strength {name}".strip(): value for name, value in self.strengths.items()}
        return self.settings() | scaled | {f"default {name}": value for name, value in self.defaults.items()}


def fit(
    activations: Activations,
    sites: Sequence[Site],
    recipe: Recipe,
    *,
    folder: Path | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[Column, ...]:
    """Fit on the train split, every site by itself; columns of one attribute at several sites share its name. An
    attribute with places of its own is fitted there alone, all others at `sites`.

    `folder` keeps what a fit needs to resume. Raises FitError.
    """
    columns = [
        column
        for site in dict.fromkeys((*sites, *recipe.own_sites))
        if (names := [name for name in activations.names if site in _sites_of(name, sites, recipe)])
        for column in _fit_at(activations, site, names, recipe, folder and folder / str(site), device, progress)
    ]
    return tuple(_adjusted(column, recipe) for column in columns)


def _sites_of(name: str, sites: Sequence[Site], recipe: Recipe) -> Sequence[Site]:
    return recipe.places.get(name, sites)


def _fit_at(
    activations: Activations,
    site: Site,
    names: Sequence[str],
    recipe: Recipe,
    folder: Path | None,
    device: str,
    progress: bool,
) -> tuple[Column, ...]:
    train = activations.contrasts(site, Split.TRAIN, names)
    if recipe.method is Method.CAA:
        return fit_difference(train, site, normalize=recipe.keep_norm)
    if recipe.method is Method.PROBE:
        return fit_probe(train, site, penalty=recipe.penalty, normalize=recipe.keep_norm)
    config = replace(recipe.mat, normalize=recipe.keep_norm)
    try:
        dev = activations.contrasts(site, Split.DEV, names)
    except FitError:
        if config.keep_best or config.patience:
            raise
        dev = None
    return fit_mat(train, site, config, dev=dev, folder=folder, device=device, progress=progress).columns


def _adjusted(column: Column, recipe: Recipe) -> Column:
    strength = recipe.strengths.get(column.attribute, recipe.strengths.get("", 1.0))
    default = recipe.defaults.get(column.attribute, 1.0)
    low, high = column.range
    return replace(
        column,
        vector=strength * column.vector,
        default_multiplier=default,
        range=(min(low, -2 * abs(default)), max(high, 2 * abs(default))),
    )
