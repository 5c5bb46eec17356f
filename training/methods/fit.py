"""One call for every method: extracted activations -> steering columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steering.types import Column, Site
from training.activations.store import Activations
from training.choices import PROFILES, Method
from training.data.samples import Split
from training.errors import FitError
from training.files import write_json
from training.methods.ablation import AblationConfig, fit_ablation
from training.methods.actadd import Pair
from training.methods.control import ControlConfig, fit_control
from training.methods.difference import fit_difference
from training.methods.head_ablation import HeadAblationConfig, fit_head_ablation
from training.methods.heads import HeadFit
from training.methods.iti import ItiConfig, fit_iti
from training.methods.mat import fit_mat
from training.methods.mat_config import MatConfig
from training.methods.probe import fit_probe


@dataclass(frozen=True)
class Recipe:
    """How columns are made from activations: a method, its own settings, and what all methods share."""

    method: Method = Method.MAT
    mat: MatConfig = field(default_factory=MatConfig)
    penalty: float = 1.0
    """Of the probe's squared weights."""
    iti: ItiConfig = field(default_factory=ItiConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    head_ablation: HeadAblationConfig = field(default_factory=HeadAblationConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    pair: Pair | None = None
    """The prompts of ActAdd, which has no other data."""
    normalize: bool | None = None
    """Keep the activation's norm; None: as the method is published (MAT-Steer keeps it)."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Attribute -> factor on its vector, so that multiplier 1 means that strength; "" is for all others."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Attribute -> default multiplier; the method's where it is not named."""
    places: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    """Attribute -> the sites at which it is fitted, in place of the sites of the others."""

    @property
    def keep_norm(self) -> bool:
        return PROFILES[self.method].keeps_norm if self.normalize is None else self.normalize

    @property
    def own_sites(self) -> tuple[Site, ...]:
        """Those of attributes with places of their own, each once."""
        return tuple(dict.fromkeys(site for sites in self.places.values() for site in sites))

    def all_sites(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """Where activations are needed to fit the others at `sites`."""
        source = self.ablation.source if self.method is Method.ABLATION else None
        return tuple(dict.fromkeys((*sites, *self.own_sites, *([source] if source else []))))

    def at(self, places: Mapping[str, tuple[Site, ...]]) -> "Recipe":
        """The same recipe with every attribute at its own places."""
        return replace(self, places=places)

    def settings(self) -> dict[str, Any]:
        """What decides the fit, in JSON's own types; strengths and defaults come after it."""
        own: dict[str, Any] = {"method": self.method.value, "normalize": self.keep_norm}
        own |= {f"place {name}": ", ".join(map(str, sites)) for name, sites in self.places.items()}
        return {**own, **self._own_settings()}

    def _own_settings(self) -> Mapping[str, Any]:
        match self.method:
            case Method.MAT:
                return self.mat.as_dict() | {"normalize": self.keep_norm}
            case Method.CAA:
                return {}
            case Method.ACTADD:
                return self.pair.as_dict() if self.pair else {}
            case Method.PROBE:
                return {"penalty": self.penalty}
            case Method.ITI:
                return self.iti.as_dict()
            case Method.ABLATION:
                return self.ablation.as_dict()
            case Method.HEAD_ABLATION:
                return self.head_ablation.as_dict()
            case Method.CONTROL:
                return self.control.as_dict()

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
    """Fit on the train split; columns of one attribute at several sites share its name. An attribute with places of
    its own is fitted there alone, all others at `sites`.

    `folder` keeps what a fit needs to resume, and what it found about heads. Raises FitError.
    """
    places = {name: recipe.places.get(name, sites) for name in activations.names}
    if recipe.method in (Method.ITI, Method.ABLATION, Method.HEAD_ABLATION, Method.CONTROL):
        columns = _fit_attributes(activations, places, recipe, folder, progress)
    else:
        columns = _fit_sites(activations, places, recipe, folder, device, progress)
    return tuple(_adjusted(column, recipe) for column in columns)


def _fit_sites(
    activations: Activations,
    places: Mapping[str, Sequence[Site]],
    recipe: Recipe,
    folder: Path | None,
    device: str,
    progress: bool,
) -> list[Column]:
    """Site by site, the attributes of each together."""
    columns: list[Column] = []
    for site in dict.fromkeys(site for sites in places.values() for site in sites):
        names = [name for name, sites in places.items() if site in sites]
        columns += _fit_at(activations, site, names, recipe, folder and folder / str(site), device, progress)
    return columns


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
    if recipe.method in (Method.CAA, Method.ACTADD):
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


def _fit_attributes(
    activations: Activations,
    places: Mapping[str, Sequence[Site]],
    recipe: Recipe,
    folder: Path | None,
    progress: bool,
) -> list[Column]:
    """Attribute by attribute, each at all its sites together."""
    columns: list[Column] = []
    accuracies: dict[str, dict[str, float]] = {}
    for name, sites in places.items():
        if not sites:
            continue
        if recipe.method is Method.ABLATION:
            columns += fit_ablation(activations, name, sites, recipe.ablation)
        elif recipe.method is Method.CONTROL:
            columns += fit_control(activations, name, sites, recipe.control, normalize=recipe.keep_norm)
        else:
            found = _fit_heads(activations, name, sites, recipe, progress)
            columns += found.columns
            accuracies[name] = {str(probe.head): probe.accuracy for probe in found.probes}
    if folder and any(accuracies.values()):
        write_json(folder / "heads.json", accuracies)
    return columns


def _fit_heads(activations: Activations, name: str, sites: Sequence[Site], recipe: Recipe, progress: bool) -> HeadFit:
    if recipe.method is Method.ITI:
        return fit_iti(activations, name, sites, recipe.iti, normalize=recipe.keep_norm, progress=progress)
    return fit_head_ablation(activations, name, sites, recipe.head_ablation, progress=progress)


def _adjusted(column: Column, recipe: Recipe) -> Column:
    strength = recipe.strengths.get(column.attribute, recipe.strengths.get("", 1.0))
    usual = PROFILES[recipe.method].multiplier
    default = recipe.defaults.get(column.attribute, usual)
    most = 2 * max(abs(default), abs(usual))
    low, high = column.range
    return replace(
        column,
        vector=strength * column.vector,
        default_multiplier=default,
        range=(min(low, -most), max(high, most)),
    )
