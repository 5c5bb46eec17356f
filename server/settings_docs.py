"""docs/settings.md, from the settings: `python -m server.settings_docs` writes it, a test looks whether it is true.

The options of `matsteer serve` are made of the same descriptions.
"""

import inspect
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt

from server.config import OLD_NAMES, PREFIX, Settings, default_text

PATH = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Written by `make api-docs` from `server/config.py`. Each can be given in the environment, some as an option of
`matsteer serve`, which goes before the environment. A variable `MATSTEER_...` that is none of these is warned of by
every command.

| setting | default | values | what it is | environment | option |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    options = serve_options()
    lines = [HEAD]
    for name, field in Settings.model_fields.items():
        cells = (
            f"`{name}`",
            default if (default := default_text(name)) == "unset" else f"`{default}`",
            _values(field.annotation, field.metadata),
            field.description or "",
            f"`{PREFIX}{name.upper()}`",
            f"`{options[name]}`" if name in options else "",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    old = ", ".join(f"`{before}` ({PREFIX}{before.upper()}) for `{name}`" for before, name in OLD_NAMES.items())
    lines.append(f"\nOld names are accepted: {old}.\n")
    lines.append(
        "\nNo settings of the server, but read: OpenTelemetry's variables ([deploy.md](deploy.md#traces)), "
        "`MATSTEER_URL` (the server that the terminal's commands ask), "
        "and in `docker-compose.yml` `MATSTEER_TORCH`, `MATSTEER_PUBLISH` and `MATSTEER_CHECKPOINTS_DIR`.\n"
    )
    return "".join(lines)


def serve_options() -> dict[str, str]:
    """Setting -> the option of `matsteer serve` that sets it."""
    from server.cli import serve

    return {
        name: f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters if name not in OLD_NAMES
    }


def _values(annotation: Any, metadata: list[Any]) -> str:
    """What may be given: the choices, or the type with its limits."""
    choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = next((part for part in choices if part is not type(None)), annotation)
    name = {int: "whole number", float: "number", bool: "`true` or `false`", Path: "path"}.get(kind, "text")
    limits = [
        f"{word} {getattr(limit, part):,}"
        for limit in metadata
        for kind_, part, word in ((Ge, "ge", "from"), (Gt, "gt", "above"), (Le, "le", "to"), (Lt, "lt", "below"))
        if isinstance(limit, kind_)
    ]
    return " ".join([name, *limits])


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
