"""An inspection as tables for the terminal, and as one HTML file that needs nothing else."""

from collections.abc import Iterable, Sequence
from itertools import combinations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from training.html import render
from training.inspection import ColumnView, Inspection, Token

SHOWN = 48  # columns on a terminal
PAIRS = 12  # of columns, where there are too many for a matrix
MATRIX = 10


def show_inspection(found: Inspection) -> Group:
    """For a terminal: columns, cosines, gates."""
    views = found.columns[:SHOWN]
    parts: list[object] = [_columns(found, views), _cosines(found, len(views))]
    if any(view.gates for view in views):
        parts.append(_gates(views))
    if len(views) < len(found.columns):
        parts.append(Text(f"{len(found.columns) - len(views)} more columns are in the page that --html writes."))
    return Group(*(part for part in parts if part is not None))  # type: ignore[arg-type]


def _columns(found: Inspection, views: Sequence[ColumnView]) -> Table:
    table = Table("column", "gate", "norm", "share", "sink", "promoted", "suppressed", title=found.name,
                  caption=f"Of {found.base_model}. share: default multiplier x norm, of the median activation norm; "
                  "sink: cosine to the activations at the first position; tokens by the final norm and the "
                  "unembedding, the strongest first.")  # fmt: skip
    for view in views:
        cells = view.label, _gate(view), f"{view.norm:.3g}", f"{view.share:.2f}", f"{view.sink:+.2f}"
        table.add_row(*map(Text, (*cells, _words(view.promoted), _words(view.suppressed))))
    return table


def _cosines(found: Inspection, count: int) -> Table | None:
    if count < 2:
        return None
    known = [(i, j, value) for i, j in combinations(range(count), 2) if (value := found.cosines[i][j]) is not None]
    if count > MATRIX:
        table = Table("column", "column", "cosine", title="the most alike")
        for i, j, value in sorted(known, key=lambda pair: -abs(pair[2]))[:PAIRS]:
            table.add_row(Text(found.columns[i].label), Text(found.columns[j].label), f"{value:+.2f}")
        return table
    table = Table("cosine")
    for view in found.columns[:count]:
        table.add_column(Text(view.label))
    for i in range(count):
        cells = ("" if (value := found.cosines[i][j]) is None else f"{value:+.2f}" for j in range(count))
        table.add_row(Text(found.columns[i].label), *cells)
    return table


def _gates(views: Iterable[ColumnView]) -> Table:
    table = Table("gate of", "reads", "sink", "mean", "over a half", "most open on",
                  caption="On the texts without their first tokens; sink: cosine of the weight to what stands "
                  "there.")  # fmt: skip
    for view in views:
        if values := view.opened:
            share = sum(value > 0.5 for value in values) / len(values)
            read = str(view.column.reads.site if view.column.reads else view.column.site)
            table.add_row(Text(view.label), read, f"{view.gate_sink:+.2f}", f"{sum(values) / len(values):.3g}",
                          f"{100 * share:.0f} %", Text(_words(view.strongest(8))))  # fmt: skip
    return table


def _gate(view: ColumnView) -> str:
    clamp = view.column.clamp
    return view.column.gate_and_site + (f", clamp {clamp.origin:.3g} + {clamp.value:.3g} m" if clamp else "")


def _words(tokens: Iterable[Token]) -> str:
    return " ".join(repr(token.text)[1:-1].strip() or "␣" for token in tokens)


def render_page(found: Inspection) -> str:
    """The whole inspection as one HTML file: tables, and every text with the strength of each gate under its tokens."""
    header = ["column", "gate", "norm", "share", "default", "sink", "promoted", "suppressed"]
    columns = [
        [view.label, _gate(view), f"{view.norm:.4g}", f"{view.share:.3f}", f"{view.column.default_multiplier:g}",
         f"{view.sink:+.3f}", _words(view.promoted), _words(view.suppressed)]
        for view in found.columns
    ]  # fmt: skip
    labels = [view.label for view in found.columns]
    cosines = [
        [label, *("" if value is None else f"{value:+.3f}" for value in line)]
        for label, line in zip(labels, found.cosines, strict=True)
    ]
    facts = {"base model": found.base_model, "method": found.method, "columns": len(labels)}
    gates = [_gate_section(view) for view in found.columns if view.gates]
    return render("inspection.html", title=found.name, facts=facts, header=header, columns=columns, labels=labels,
                  cosines=cosines, gates=gates)  # fmt: skip


def _gate_section(view: ColumnView) -> dict[str, object]:
    values = view.opened or [0.0]
    most = max(map(abs, values)) or 1.0
    about = (
        f"{view.column.gate_and_site}: mean {sum(values) / len(values):.4g}, largest {most:.4g}; cosine of its weight "
        f"to the sink {view.gate_sink:+.3f}. First tokens are never steered."
    )
    return {"label": view.label, "about": about, "most": most, "texts": view.gates}
