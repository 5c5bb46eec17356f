"""Options of the command line that commands share: dataclasses whose fields stand in a command's signature.

A command takes some of these dataclasses as parameters; `with_option_groups` puts their fields in place of them. A
field is an option as typer reads it, `Annotated[type, typer.Option(...)]` with its default.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Self

import typer


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"it takes a JSON object, as in '{{\"enable_thinking\": false}}', not {text!r}")
    return found


ChatTemplateFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A chat template (Jinja) instead of the model's own.")
]
ChatTemplateKwargs = Annotated[
    dict[str, Any] | None,
    typer.Option(
        metavar="JSON", parser=_object, help="Variables of the chat template, as in '{\"enable_thinking\": false}'."
    ),
]


class OptionGroup:
    """Base of the dataclasses whose fields are options."""

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """What stands in a command's signature for the group."""
        return [
            option_parameter(
                field.name, field.type, inspect.Parameter.empty if field.default is MISSING else field.default
            )
            for field in fields(cls)  # type: ignore[arg-type]
        ]

    @classmethod
    def take(cls, given: dict[str, Any]) -> Self:
        """The group from a command's arguments, which it is taken out of."""
        return cls(**{parameter.name: given.pop(parameter.name) for parameter in cls.parameters()})


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command whose parameters that are option groups are replaced by the groups' options."""
    signature = inspect.signature(command)
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, OptionGroup):
            groups[name] = parameter.annotation
            parameters += parameter.annotation.parameters()
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**given: Any) -> None:
        taken = {name: group.take(given) for name, group in groups.items()}
        command(**taken, **given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def option_parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
