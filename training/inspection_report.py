"""An inspection as tables for the terminal, and as one HTML file that needs nothing else."""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations

from rich.console import Group
from rich.table import Table
from rich.text import Text

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


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#1b1f24;background:#fff}
table{border-collapse:collapse;margin:1rem 0}
td,th{border-bottom:1px solid #d8dee4;padding:.25rem .6rem;text-align:left;vertical-align:top}
code{background:#f2f4f7;padding:0 .25rem;border-radius:3px;white-space:pre}
.text{white-space:pre-wrap;margin:.5rem 0 1rem}
.text span{border-radius:3px}
@media(prefers-color-scheme:dark){
body{background:#15181c;color:#e6e8eb}code{background:#262b31}td,th{border-color:#343b43}}
"""


def render_page(found: Inspection) -> str:
    """The whole inspection as an HTML document: tables, and every text shaded by each gate."""
    title = f"{found.name} of {found.base_model}"
    rows = [
        [view.label, _gate(view), f"{view.norm:.4g}", f"{view.share:.3f}", f"{view.column.default_multiplier:g}",
         f"{view.sink:+.3f}", _codes(view.promoted), _codes(view.suppressed)]
        for view in found.columns
    ]  # fmt: skip
    labels = [view.label for view in found.columns]
    cosines = [
        [label, *("" if value is None else f"{value:+.3f}" for value in line)]
        for label, line in zip(labels, found.cosines, strict=True)
    ]
    parts = [
        f"<h1>{escape(title)}</h1><p>Method: {escape(found.method)}. Tokens: what each vector by itself makes likelier "
        "and less likely, by the final norm and the unembedding, with its logit. Share: default multiplier x norm, of "
        "the median norm of the activations at the site. Sink: the cosine to the activations at the first position of "
        "the texts.</p>",
        _table(["column", "gate", "norm", "share", "default", "sink", "promoted", "suppressed"], rows, {6, 7}),
    ]
    if len(labels) > 1:
        parts += ["<h2>Cosines between columns</h2>", _table(["", *labels], cosines, set())]
    parts += [_gate_section(view) for view in found.columns if view.gates]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], markup: set[int]) -> str:
    """Cells of the columns in `markup` are HTML already."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if i in markup else escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _codes(tokens: Iterable[Token]) -> str:
    return " ".join(f'<code title="{token.value:+.3f}">{escape(repr(token.text)[1:-1])}</code>' for token in tokens)


def _gate_section(view: ColumnView) -> str:
    values = view.opened
    most = max((abs(value) for value in values), default=0.0) or 1.0
    texts = "".join(
        '<p class="text">' + "".join(_shaded(token, most) for token in text) + "</p>" for text in view.gates
    )
    mean = f"{sum(values) / len(values):.4g}" if values else "-"
    sink = f"{view.gate_sink:+.3f}" if view.gate_sink is not None else "-"
    return (
        f"<h2>Gate of {escape(view.label)}</h2><p>{escape(view.column.gate_and_site)}; mean {mean}, largest "
        f"{most:.4g}; cosine of its weight to the sink {sink}. First tokens are never steered.</p>{texts}"
    )


def _shaded(token: Token, most: float) -> str:
    share = min(1.0, abs(token.value) / most)
    shade = f"rgba({'46,160,67' if token.value >= 0 else '207,34,46'},{0.75 * share:.3f})"
    return f'<span style="background:{shade}" title="{token.value:.4g}">{escape(token.text)}</span>'
