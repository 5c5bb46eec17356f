"""One call for every method: extracted activations -> steering columns."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steering.column import Column
from steering.types import Site
from training.activations import SINK
from training.activations.store import Activations
from training.data.samples import Sample, Split
from training.errors import FitError
from training.methods import Method, MethodConfig, method_of
from training.methods.base import FitInputs
from training.methods.mat import MatConfig
from training.models import Base

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How columns are made from activations: the settings of a method, and what all methods share."""

    config: MethodConfig = field(default_factory=MatConfig)
    """Its type says which method it is."""
    normalize: bool | None = None
    """Keep the activation's norm; None: as the method is published (MAT-Steer keeps it)."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Attribute -> factor on its vector, or on the value of its clamp, so that multiplier 1 means that strength; "" is
    for all others."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Attribute -> default multiplier; the method's where it is not named."""
    places: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    """Attribute -> the sites at which it is fitted, in place of the sites of the others."""

    @property
    def method(self) -> Method:
        return method_of(self.config)

    @property
    def keep_norm(self) -> bool:
        return bool(self.method.keep_norm if self.normalize is None else self.normalize)

    def strength(self, attribute: str) -> float:
        """The factor on an attribute's vector."""
        return self.strengths.get(attribute, self.strengths.get("", 1.0))

    def all_sites(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """Where activations are needed to fit the others at `sites`."""
        own = (site for sites in self.places.values() for site in sites)
        return tuple(dict.fromkeys((*sites, *own, *self.config.extra_sites())))

    def at(self, places: Mapping[str, tuple[Site, ...]]) -> "Recipe":
        """The same recipe with every attribute at its own places."""
        return replace(self, places=places)

    def settings(self) -> dict[str, Any]:
        """What decides the fit, in JSON's own types; strengths and defaults come after it."""
        places = {f"place {name}": ", ".join(map(str, sites)) for name, sites in self.places.items()}
        return {"method": self.method.name, **places, **self.config.as_dict(), "normalize": self.keep_norm}

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
    base: Base | None = None,
    samples: Sequence[Sample] = (),
) -> tuple[Column, ...]:
    """Fit on the train split; columns of one attribute at several sites share its name. An attribute with places of
    its own is fitted there alone, all others at `sites`.

    `folder` keeps what a fit needs to resume, and what it found about heads. `base` and the texts, `samples`, are for a
    method that is trained through the model. Raises FitError.
    """
    places = {name: recipe.places.get(name, sites) for name in activations.names}
    warn_of_sinks(activations, places)
    inputs = FitInputs(activations, places, recipe.keep_norm, folder, device, progress, base, samples)
    if recipe.method.through_model and (base is None or not samples):
        raise FitError(
            f"--method {recipe.method.name} is trained through the model on texts: stored activations are not enough."
        )
    return tuple(_with_strength(column, recipe) for column in recipe.method.fit(inputs, recipe.config))


def warn_of_sinks(activations: Activations, places: Mapping[str, Sequence[Site]]) -> None:
    """Warn of activations of the train split with wild norms, which pull vectors towards themselves."""
    for site in dict.fromkeys(site for sites in places.values() for site in sites):
        norms = {
            name: activations.at(site)[activations.rows(attribute=name, split=Split.TRAIN)].norm(dim=1)
            for name in activations.names
        }
        usual = min((float(own.median()) for own in norms.values() if len(own)), default=0.0)
        for name, own in norms.items():
            if usual and (wild := int((own > SINK * usual).sum())) and site in places[name]:
                log.warning(
                    "%d of the %d activations of %r at %s have more than %g times the usual norm, as attention sinks "
                    "have, and steer vectors along themselves: give its texts a prompt, pool by mean, or take an "
                    "earlier layer or another site.",
                    wild,
                    len(own),
                    name,
                    site,
                    SINK,
                )


def _with_strength(column: Column, recipe: Recipe) -> Column:
    """With the vector, default multiplier and range that the recipe asks for."""
    strength = recipe.strength(column.attribute)
    usual = recipe.method.multiplier
    default = recipe.defaults.get(column.attribute, usual)
    most = 2 * max(abs(default), abs(usual))
    low, high = column.range
    clamp = column.clamp and replace(column.clamp, value=strength * column.clamp.value)
    return replace(
        column,
        vector=column.vector if clamp else strength * column.vector,
        clamp=clamp,
        default_multiplier=default,
        range=(min(low, -most), max(high, most)),
    )
