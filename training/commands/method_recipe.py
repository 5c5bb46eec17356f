"""From a command's options to the recipe of a fit."""

from dataclasses import fields, replace
from math import isfinite
from typing import Any

from steering.errors import SteeringError
from steering.types import Site
from training.choices import Direction, Fill, Method, Scale
from training.commands.method_options import MethodOptions
from training.errors import TrainingError
from training.methods.ablation import AblationConfig
from training.methods.actadd import Pair
from training.methods.control import ControlConfig
from training.methods.fit import Recipe
from training.methods.head_ablation import HeadAblationConfig
from training.methods.heads import Head, Probing, parse_heads
from training.methods.iti import ItiConfig
from training.methods.mat_config import PAPER, MatConfig
from training.options import parse_settings


def make_recipe(how: MethodOptions, seed: int) -> Recipe:
    """Raises TrainingError."""
    how.check()
    for field in fields(how):
        value = getattr(how, field.name)
        if isinstance(value, float) and not isfinite(value):
            raise TrainingError(f"--{field.name.replace('_', '-')} must be a finite number, got {value}.")
    return Recipe(how.method, normalize=how.normalize, **_settings(how, seed))


def _settings(how: MethodOptions, seed: int) -> dict[str, Any]:
    """The fields of a Recipe that the method reads."""
    penalty, direction = 1.0 if how.penalty is None else how.penalty, how.direction or Direction.MEAN
    probing = Probing(penalty=penalty, seed=seed)
    match how.method:
        case Method.MAT:
            return {"mat": _mat_config(how, seed)}
        case Method.CAA:
            return {}
        case Method.ACTADD:
            if how.pair is None:
                raise TrainingError("--method actadd needs --pair, the two prompts.")
            return {"pair": Pair.of(*how.pair, attribute=how.attribute)}
        case Method.PROBE:
            return {"penalty": penalty}
        case Method.ITI:
            return {"iti": ItiConfig(how.top, direction, probing)}
        case Method.ABLATION:
            return {"ablation": AblationConfig(_source(how.source))}
        case Method.HEAD_ABLATION:
            return {"head_ablation": HeadAblationConfig(_heads(how.heads), how.top, how.fill or Fill.ZERO, probing)}
        case Method.CONTROL:
            coefficients = _coefficients(how.coefficient)
            return {"control": ControlConfig(direction, how.scale or Scale.DIFFERENCE, coefficients)}


def _mat_config(how: MethodOptions, seed: int) -> MatConfig:
    """An option that is named as a setting of MAT-Steer is that setting."""
    names = {field.name for field in fields(MatConfig)} & {field.name for field in fields(how)} - {"normalize"}
    given: dict[str, Any] = {name: value for name in names if (value := getattr(how, name)) is not None}
    return replace(PAPER if how.paper else MatConfig(), seed=seed, **given)


def _heads(given: str | None) -> tuple[Head, ...]:
    return parse_heads(given) if given is not None else ()


def _source(given: str | None) -> Site | None:
    try:
        return None if given is None else Site.parse(given)
    except SteeringError:
        raise TrainingError(f"--source must be LAYER.SITE, as in 12.residual, got {given!r}.") from None


def _coefficients(given: list[str] | None) -> dict[int, float]:
    settings = parse_settings(given, "--coefficient")
    if wrong := [name for name in settings if not (name.isascii() and name.isdigit())]:
        raise TrainingError(f"--coefficient must be LAYER=NUMBER, as in 12=0.5, got layer {wrong[0]!r}.")
    return {int(layer): value for layer, value in settings.items()}
