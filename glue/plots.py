"""Plots as SVG text, for a page that needs nothing else: numbers in, markup out. Pure.

A plot is ``WIDTH`` units wide, about what a phone shows, so that its text is as large there as the page's. Colours are
classes, ``c0`` to ``c7``, that the page defines for light and for dark; a regime is told by its number too, and what
lies under a pointer says its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 336, 26, 218
NAME = 24  # characters of a name that fit beside its numbers
LINE = 11  # of labels below each other
ROW = 34  # of a plot with a row a regime
COLOURS = 8
WIDER = 4  # than the narrowest interval: one that is leaves the plot
CHEAPER = 300  # than the dearest: one that is stands at the edge

Number = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """Values ``low`` to ``high`` on ``start`` to ``end``, both ways round; ``log`` by decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)

    def within(self, value: float) -> float:
        """The place of a value; of one beyond the axis, its end."""
        return self(min(max(value, self.low), self.high))

    def ticks(self) -> list[float]:
        """Round values within, from two to about six."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1,)):
                every = [10.0**decade * factor for decade in decades for factor in factors]
                within = [value for value in every if self.low * 0.999 <= value <= self.high * 1.001]
                if 2 <= len(within) <= 6:
                    return within
            if len(within) > 6:
                return within[:: math.ceil(len(within) / 6)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 10) for number in range(first, last + 1)]


def axis(values: Iterable[float], start: float, end: float, log: bool = False, margin: float = 0.06) -> Axis:
    """One that all finite values fit on, with some room."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(found), max(found)
    if log:
        room = max((high / low) ** margin, 1.15)
        return Axis(low / room, high * room, start, end, log=True)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


@dataclass(frozen=True)
class Row:
    """A value with its interval, if it has one. ``style``: the regime's number, from 0."""

    style: int
    name: str
    mean: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Line:
    """A curve; ``label`` stands at its end, ``faint`` are those that it is the mean of, ``dots`` are worth seeing."""

    style: int
    name: str
    label: str
    points: Sequence[tuple[float, float]]
    faint: Sequence[Sequence[tuple[float, float]]] = ()
    dots: Sequence[tuple[float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """A regime by what it costs and how good it is; ``without``: what it costs if somebody else paid for its scores."""

    row: Row
    cost: float
    without: float


def bars(rows: Sequence[Row], constant: float | None) -> str:
    """A bar a regime from zero, the interval as a whisker; ``constant`` as a mark on each."""
    ends = [*_in_sight(rows), *([] if constant is None else [constant])]
    x = Axis(min(0.0, *ends), max(max(ends), min(ends) + 1, 1.0) * 1.02, 8, WIDTH - 12)
    parts: list[str] = []
    bottom = 8 + ROW * len(rows)
    for number, row in enumerate(rows):
        top = 8 + ROW * number
        left, right = sorted((x(0), x(row.mean)))
        bar = f'<rect x="{left}" y="{top + 16}" width="{max(right - left, 0.5):.1f}" height="11" rx="2"/>'
        parts.append(_group(row.style, _title(f"{row.name}: {row.text}") + bar + _whisker(x, row, top + 21.5)))
        parts.append(_row_text(row, top))
        if constant is not None:
            parts.append(_line(x(constant), top + 15, x(constant), top + 30, "constant"))
    parts += [_x_ticks(x, bottom, f"{{:.{_digits(x)}f}}".format)]
    return _svg(parts, bottom + 22, "bars: " + "; ".join(f"{row.name} {row.text}" for row in rows))


def forest(rows: Sequence[Row]) -> str:
    """A dot a regime with its interval, about a line at zero."""
    x = axis([0.0, *_in_sight(rows)], 8, WIDTH - 12)
    bottom = 8 + ROW * len(rows)
    parts: list[str] = []
    for number, row in enumerate(rows):
        top = 8 + ROW * number
        dot = f'<circle cx="{x(row.mean)}" cy="{top + 22}" r="5" class="{"" if row.low is not None else "hollow"}"/>'
        parts.append(_line(x(0), top + 14, x(0), top + ROW - 4, "zero"))
        parts.append(_group(row.style, _title(f"{row.name}: {row.text}") + _whisker(x, row, top + 22) + dot))
        parts.append(_row_text(row, top))
    parts.append(_x_ticks(x, bottom, lambda value: f"{value:+.{_digits(x)}f}" if value else "0"))
    return _svg(parts, bottom + 22, "differences: " + "; ".join(f"{row.name} {row.text}" for row in rows))


def lines(found: Sequence[Line], x_label: str, y_label: str, x_text: Number, y_text: Number, log: bool = False) -> str:
    """Curves, each with its label at its end. ``log``: the horizontal axis."""
    every = [point for line in found for each in (line.points, *line.faint) for point in each]
    right = WIDTH - 12 - 7 * max(len(line.label) for line in found)
    x = axis((at for at, _ in every), LEFT, right, log, margin=0.0 if log else 0.02)
    y = axis((at for _, at in every), BOTTOM, TOP)
    parts = [_frame(x, y, x_label, y_label, x_text, y_text)]
    for line in found:
        inner = _title(line.name) + "".join(_path(x, y, each, "faint") for each in line.faint)
        inner += _path(x, y, line.points, "line dashed" if line.dashed else "line")
        for at, value in line.dots:
            inner += f'<circle cx="{x(at)}" cy="{y(value)}" r="5"/>'
        parts.append(_group(line.style, inner))
    ends = [(line.style, line.label, x(line.points[-1][0]), y(line.points[-1][1])) for line in found]
    return _svg([*parts, _numbers(ends)], HEIGHT, f"{y_label} over {x_label}")


def scatter(found: Sequence[Point], x_label: str, y_label: str, x_text: Number) -> str:
    """Cost against quality: filled with all of the scoring, hollow without, the interval upright.

    Of points of equal cost each is a little to the right of the last, so that all intervals are seen. What costs next
    to nothing stands at the left edge, or there would be no width to tell the others apart.
    """
    costs = [cost for point in found for cost in (point.cost, point.without)]
    x = axis((cost for cost in costs if cost * CHEAPER > max(costs)), LEFT + 8, RIGHT - 44, log=True)
    y = axis(_in_sight([point.row for point in found]), BOTTOM, TOP)
    parts, places = [_frame(x, y, x_label, y_label, x_text, f"{{:.{_digits(y)}f}}".format)], []
    for point in found:
        row, up = point.row, y(point.row.mean)
        across = _beside([x.within(other.cost) for other in found[: found.index(point)]], x.within(point.cost))
        inner = _title(f"{row.name}: {row.text}")
        if row.low is not None and row.high is not None:
            inner += _line(across, y.within(row.low), across, y.within(row.high), "whisker")
        if point.without < point.cost:
            inner += _line(x.within(point.without), up, across, up, "dotted")
            inner += f'<circle cx="{x.within(point.without)}" cy="{up}" r="4" class="hollow"/>'
        parts.append(_group(row.style, inner + f'<circle cx="{across}" cy="{up}" r="5"/>'))
        places.append((row.style, str(row.style + 1), across, up))
    return _svg([*parts, _numbers(places, RIGHT - 12)], HEIGHT, f"{y_label} over {x_label}")


# --- parts -----------------------------------------------------------------------------------------------------------


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    inner = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _group(style: int, inner: str) -> str:
    return f'<g class="c{style % COLOURS}">{inner}</g>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def _row_text(row: Row, top: float) -> str:
    name = row.name if len(row.name) <= NAME else f"{row.name[: NAME - 1]}…"
    return _text(8, top + 11, f"{row.style + 1} {name}") + _text(WIDTH - 12, top + 11, row.text, "value", "end")


def _whisker(x: Axis, row: Row, at: float) -> str:
    if row.low is None or row.high is None:
        return ""
    ends = "".join(
        _line(x(end), at - 4, x(end), at + 4, "whisker") for end in (row.low, row.high) if x.low <= end <= x.high
    )
    return _line(x.within(row.low), at, x.within(row.high), at, "whisker") + ends


def _in_sight(rows: Sequence[Row]) -> list[float]:
    """What an axis has to hold: all means, and the intervals but for those so wide that nothing else could be seen."""
    known = [(row.low, row.high) for row in rows if row.low is not None and row.high is not None]
    widest = WIDER * min((high - low for low, high in known), default=0.0)
    return [row.mean for row in rows] + [end for low, high in known if high - low <= widest for end in (low, high)]


def _path(x: Axis, y: Axis, points: Sequence[tuple[float, float]], kind: str) -> str:
    places = " ".join(f"{x(at)},{y(value)}" for at, value in points if at > 0 or not x.log)
    return f'<polyline points="{places}" class="{kind}"/>'


def _digits(scale: Axis) -> int:
    ticks = scale.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _x_ticks(x: Axis, at: float, text: Number) -> str:
    ticks = "".join(_line(x(value), at, x(value), at + 4, "axis") for value in x.ticks())
    labels = "".join(_text(x(value), at + 17, text(value), "tick", "middle") for value in x.ticks())
    return _line(x.start, at, x.end, at, "axis") + ticks + labels


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, x_text: Number, y_text: Number) -> str:
    grid = "".join(_line(LEFT, y(value), RIGHT, y(value), "grid") for value in y.ticks())
    grid += "".join(_text(LEFT - 6, y(value) + 4, y_text(value), "tick", "end") for value in y.ticks())
    labels = _text((LEFT + RIGHT) / 2, HEIGHT - 6, x_label, "tick", "middle") + _text(4, 13, y_label, "tick")
    return grid + _x_ticks(x, BOTTOM, x_text) + labels


def _beside(before: Sequence[float], at: float) -> float:
    return round(at + 5 * sum(abs(other - at) < 3 for other in before), 1)


def _numbers(ends: Sequence[tuple[int, str, float, float]], at: float | None = None) -> str:
    """Labels in the order of their points, pushed apart where they would overlap: beside the points, or all of them at
    ``at``, each with a line to its point.
    """
    found, left = "", sorted(ends, key=lambda end: end[2])
    while left:
        column = sorted((end for end in left if at or end[2] - left[0][2] < 14), key=lambda end: end[3])
        left = [end for end in left if end not in column]
        for (style, label, x, height), y in zip(column, _apart([end[3] for end in column]), strict=True):
            if at:
                found += _group(style, _line(x + 6, height, at - 3, round(y, 1), "faint"))
            found += (
                f'<text x="{at or x + 5:.1f}" y="{y + 4:.1f}" class="number c{style % COLOURS}">{escape(label)}</text>'
            )
    return found


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights, in ascending order, a line apart at least and within the plot: those in each other's way are centred."""
    blocks: list[list[float]] = []
    for height in heights:
        block = [height]
        while blocks and _edge(blocks[-1], 1) > _edge(block, -1):
            block = blocks.pop() + block
        blocks.append(block)
    return [_edge(block, -1) + LINE * (number + 0.5) for block in blocks for number in range(len(block))]


def _edge(block: Sequence[float], side: int) -> float:
    """Where the labels of a block begin (-1) or end (1); between the top and the axis in any case."""
    half = LINE * len(block) / 2
    return min(max(sum(block) / len(block), half + 2), BOTTOM - half) + side * half
