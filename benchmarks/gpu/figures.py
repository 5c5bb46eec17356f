"""Figures, and the table that they make."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HEAD = ("part", "what", "measured", "wanted", "", "note")


@dataclass(frozen=True)
class Figure:
    """A number, and what is wanted of it: the least or the most that it may be, or nothing."""

    name: str
    value: float
    unit: str = ""
    note: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def measured(self) -> str:
        whole = abs(self.value) >= 1000 or float(self.value).is_integer()
        number = f"{self.value:,.0f}" if whole else f"{self.value:.3g}"
        return f"{number} {self.unit}".strip()

    @property
    def wanted(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g} {self.unit}".strip()
        return f"<= {self.at_most:g} {self.unit}".strip() if self.at_most is not None else ""

    @property
    def missed(self) -> bool:
        """A figure that is not a number has missed whatever is wanted of it."""
        if self.at_least is not None:
            return not self.value >= self.at_least
        return self.at_most is not None and not self.value <= self.at_most


@dataclass
class Report:
    """What has been measured so far. `judged`: the device and the shape are those that something is wanted of.
    `optional`: parts that may be skipped all the same."""

    out: Path  # without its ending
    judged: bool
    optional: frozenset[str] = frozenset()
    machine: dict[str, Any] = field(default_factory=dict)
    figures: list[tuple[str, Figure]] = field(default_factory=list)  # with their parts
    troubles: dict[str, str] = field(default_factory=dict)  # parts that failed, or did not come to an end, and why
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # that each part took

    def add(self, part: str, figure: Figure) -> None:
        self.figures.append((part, figure))
        self.write()

    @property
    def missed(self) -> list[str]:
        """Names of the figures that are not what is wanted."""
        return [f"{part}: {one.name}" for part, one in self.figures if self.judged and one.missed]

    @property
    def missing(self) -> list[str]:
        """Parts that were skipped though something is wanted of them."""
        return [part for part in self.skipped if self.judged and part not in self.optional]

    def row(self, part: str, figure: Figure) -> tuple[str, ...]:
        verdict = ("missed" if figure.missed else "ok") if self.judged and figure.wanted else ""
        return part, figure.name, figure.measured, figure.wanted, verdict, figure.note

    def rows(self) -> list[tuple[str, ...]]:
        found = [self.row(part, figure) for part, figure in self.figures]
        found += [(part, "", "", "", "failed", why) for part, why in self.troubles.items()]
        verdicts = {part: "missing" if part in self.missing else "skipped" for part in self.skipped}
        return found + [(part, "", "", "", verdicts[part], why) for part, why in self.skipped.items()]

    def table(self) -> str:
        """For a terminal."""
        rows = [HEAD, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        return "\n".join(line(row, widths) for row in rows)

    def write(self) -> None:
        """`out`.json and `out`.md, as far as there is something to tell."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        told: Mapping[str, Any] = {
            "machine": self.machine,
            "judged": self.judged,
            "figures": [{"part": part, **asdict(one), "missed": one.missed} for part, one in self.figures],
            "failed": self.troubles,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }
        self.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        lines = ["# The engine on a GPU", "", *(f"- {name}: {value}" for name, value in self.machine.items()), ""]
        lines += [f"| {' | '.join(HEAD)} |", "| --- | --- | ---: | ---: | --- | --- |"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in self.rows()]
        self.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def line(row: tuple[str, ...], widths: list[int]) -> str:
    """One of the table's, with numbers at the right of their columns."""
    cells = [
        cell.rjust(width) if column in (2, 3) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
