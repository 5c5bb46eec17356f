"""The model card of an imported checkpoint: what the foreign file said, and what nobody has measured."""

from collections.abc import Sequence

from steering.column import Column, attribute_names
from steering.types import Positions


def render(
    *, name: str, version: str, base_model: str, columns: Sequence[Column], positions: Positions, file: str, format: str
) -> str:
    """The card as Markdown."""
    rows = [
        f"| {c.attribute} | {c.site} | {c.gate_and_site} | {('no', 'yes')[c.keep_norm]} | "
        f"{float(c.vector.norm()):.3f} | {f'{c.clamp.value:g} x multiplier' if c.clamp else 'no'} |"
        for c in columns
    ]
    return "\n".join(
        [
            f"---\nbase_model: {base_model}\ntags: [activation-steering, imported]\n---\n",
            f"# {name}, version {version}\n",
            f"Steers **{', '.join(attribute_names(columns))}** of `{base_model}`. Imported from `{file}` ({format}); "
            f"steered positions: {positions}.\n",
            "## Vectors\n",
            "| attribute | site | gate | norm kept | norm of the vector | projection set to |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "## Evaluation\n",
            "None: the file carries no evaluation. `matsteer evaluate` measures it.",
            "",
        ]
    )
