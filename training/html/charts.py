"""Geometry of the bars and lines that `parts.html` draws: a page has no script that could work it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 408, 10, 198
STEPS = (1, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Scale:
    """Ends of an axis."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], *, low: float = 0.0, high: float = 0.0) -> "Scale":
        """With 0, all finite `values`, and at least `low` to `high`; ends that read well."""
        known = [value for value in values if isfinite(value)]
        below, above = nice(-min([low, *known])), nice(max([high, *known]))
        return cls(0.0 - below, above or float(not below))

    def share(self, value: float) -> float:
        """Of the width, in percent, 0 to 100."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)


def nice(value: float) -> float:
    """The next number above that reads well; 0 for 0 and below."""
    if value <= 0:
        return 0.0
    size = 10.0 ** floor(log10(value))
    return next(step * size for step in STEPS if step * size >= value * (1 - 1e-9))


@dataclass(frozen=True)
class Bar:
    """All in percent of the width."""

    left: float
    width: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def at(cls, scale: Scale, value: float, low: float | None = None, high: float | None = None) -> "Bar":
        """From 0 to `value`, with the interval."""
        ends = sorted((scale.share(0.0), scale.share(value)))
        if low is None or high is None:
            return cls(ends[0], round(ends[1] - ends[0], 2))
        return cls(ends[0], round(ends[1] - ends[0], 2), scale.share(low), scale.share(high))


@dataclass(frozen=True)
class Point:
    """`text`: what is told of it."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    name: str
    tint: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    name: str
    tint: str
    dashed: bool
    points: str
    band: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Chart:
    """Lines over `axis`, in the units of an SVG of `width` x `height`."""

    title: str
    axis: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    zero: float | None
    """Where 0 is on the axis, between negative and positive numbers."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM

    @classmethod
    def of(cls, title: str, axis: str, series: Sequence[Series], *, high: float = 0.0) -> "Chart":
        """`high`: the vertical axis reaches at least there."""
        xs = sorted({point.x for one in series for point in one.points})
        ys = [
            value
            for one in series
            for point in one.points
            for value in (point.y, point.low, point.high)
            if value is not None
        ]
        across, up = Scale(xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1), Scale.of(ys, high=high)

        def x(value: float) -> float:
            return round(LEFT + across.share(value) / 100 * (RIGHT - LEFT), 1)

        def y(value: float) -> float:
            return round(BOTTOM - up.share(value) / 100 * (BOTTOM - TOP), 1)

        lines = []
        for one in series:
            points = sorted(one.points, key=lambda point: point.x)
            known = [(point.x, point.low, point.high) for point in points if point.low is not None]
            around = [(at, low) for at, low, _ in known] + [(at, high) for at, _, high in reversed(known)]
            lines.append(
                Line(
                    one.name,
                    one.tint,
                    one.dashed,
                    " ".join(f"{x(point.x)},{y(point.y)}" for point in points),
                    " ".join(f"{x(at)},{y(value or 0.0)}" for at, value in around),
                    [Mark(x(point.x), y(point.y), f"{one.name}: {point.text} at {point.x:g}") for point in points],
                )
            )
        middle = (up.low + up.high) / 2
        return cls(
            title,
            axis,
            lines,
            [Tick(x(value), f"{value:g}") for value in _apart(xs, across)],
            [Tick(y(value), f"{value:.3g}") for value in (up.low, middle, up.high)],
            x(0.0) if across.low < 0 < across.high else None,
        )


def _apart(values: Sequence[float], scale: Scale) -> list[float]:
    """Those that can be written beside each other: both ends first, then 0, then what else has room."""
    chosen: list[float] = []
    for value in (values[0], values[-1], *(one for one in values if one == 0), *values):
        if all(abs(scale.share(value) - scale.share(other)) >= 9 for other in chosen):
            chosen.append(value)
    return sorted(chosen)
