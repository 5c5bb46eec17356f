"""Recipes: options of `matsteer train` in a YAML file, those of published runs in `training/recipes/`."""

from pathlib import Path
from typing import Any

import typer

from training.errors import TrainingError

FOLDER = Path(__file__).with_name("recipes")


def known() -> list[str]:
    """The names of those that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def use(context: typer.Context, recipe: str) -> dict[str, Any]:
    """The options of a recipe, a known one or a .yaml file, are the command's defaults from now on: what is given on
    the command line wins. Returns them by the names of their parameters. Raises TrainingError."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else FOLDER / f"{recipe}.yaml"
    if path.parent == FOLDER and recipe not in known():
        raise TrainingError(f"There is no recipe {recipe!r}; there are {', '.join(known())}, or a .yaml file.")
    options = {name: one.name for one in context.command.params for name in one.opts}
    found = {}
    for name, value in _read(path).items():
        if (parameter := options.get(f"--{name}")) in (None, "recipe"):
            raise TrainingError(f"{path} names --{name}, which is no option of {context.command.name}.")
        found[parameter] = value
    context.default_map = {**(context.default_map or {}), **found}
    return found


def _read(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"The recipe {path} cannot be read: {error}.") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise TrainingError(f"The recipe {path} is no mapping of options, as in 'layer: 14'.")
    return found
