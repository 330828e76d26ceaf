"""Charts as SVG text that takes its colours from the page around it. Pure functions.

Colours are CSS classes: ``s0`` and ``s1`` (series), ``grid``, ``tick`` …. Every mark has a ``<title>`` with its number:
browsers show it on hover, and screen readers read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 36, 10, 14, 40

Series = Mapping[str, Sequence[float | None]]  # values by name; None draws nothing, but keeps the others' colours


def bars(
    labels: Sequence[str], series: Series, x_title: str, unit: str, ticks: Sequence[str], notes: Sequence[str]
) -> str:
    """A group of bars a label, a bar a series, each with its value.

    Args:
        ticks: what stands below the groups; ``labels`` and ``notes`` are in the titles.
    """
    top = _nice_top([value for values in series.values() for value in values if value is not None])
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(labels))
    width = min(34.0, slot * 0.84 / max(1, len(series)))
    marks = []
    for number, (name, values) in enumerate(series.items()):
        for place, value in enumerate(values):
            if value is None:
                continue
            x, y = LEFT + slot * (place + 0.5) + width * (number - len(series) / 2), _y(value, top)
            said = f"{labels[place]} · {name}: {value:.2f} {unit}, {notes[place]}"
            marks.append(
                f'<g class="s{number}"><title>{escape(said)}</title>'
                f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{_y(0, top) - y:.1f}"/></g>'
            )
            if width >= 15:
                number_text = f"{value:.{2 if width > 22 else 1}f}"
                marks.append(f'<text class="value" x="{x + width / 2:.1f}" y="{y - 3:.1f}">{number_text}</text>')
    marks += [
        f'<text class="tick" x="{LEFT + slot * (place + 0.5):.1f}" y="{HEIGHT - BOTTOM + 14}">{escape(tick)}</text>'
        for place, tick in enumerate(ticks)
    ]
    return _svg(_grid(top) + "".join(marks), x_title, f"mean {unit}")


def curve(x_N: Sequence[float], series: Series, x_title: str, unit: str) -> str:
    """A line a series over the numbers ``x_N``."""
    top = _nice_top([value for values in series.values() for value in values if value is not None])
    right = _nice_top(x_N)
    marks = []
    for number, (name, values) in enumerate(series.items()):
        pairs = [(x, value) for x, value in zip(x_N, values, strict=True) if value is not None]
        if not pairs:
            continue
        points = " ".join(f"{_x(x, right):.1f},{_y(value, top):.1f}" for x, value in pairs)
        marks.append(f'<polyline class="line s{number}" points="{points}"/>')
        marks += [
            f'<circle class="dot s{number}" cx="{_x(x, right):.1f}" cy="{_y(value, top):.1f}" r="5">'
            f"<title>{escape(f'{x:g} · {name}: {value:.2f} {unit}')}</title></circle>"
            for x, value in pairs
        ]
    return _svg(_grid(top) + "".join(marks) + _x_ticks(right), x_title, f"mean {unit}")


def histogram(width: float, series: Series, x_title: str, start: float = 0.0, y_title: str = "% of tokens") -> str:
    """Shares by bins of ``width`` from ``start``: an area, and of a second series a line over it; none of no bins."""
    top = _nice_top([100 * (value or 0) for values in series.values() for value in values])
    bins = max(map(len, series.values()))
    right = bins * width
    marks, floor = [], _y(0, top)
    for number, (name, values) in enumerate(series.items()):
        if not values:
            continue
        outline = []
        for place, value in enumerate(values):
            left, end, y = _x(place * width, right), _x((place + 1) * width, right), _y(100 * (value or 0), top)
            outline += [f"{left:.1f},{y:.1f}", f"{end:.1f},{y:.1f}"]
            low, high = start + place * width, start + (place + 1) * width
            text = f"{low:.2g} to {high:.2g} · {name}: {value or 0:.1%}"
            marks.append(
                f'<rect class="hit" x="{left:.1f}" y="{y:.1f}" width="{end - left:.1f}" height="{floor - y:.1f}">'
                f"<title>{escape(text)}</title></rect>"
            )
        shape = "area" if number == 0 else "line"
        points = " ".join([f"{_x(0, right):.1f},{floor}", *outline, f"{_x(right, right):.1f},{floor}"])
        marks.insert(number, f'<polyline class="{shape} s{number}" points="{points}"/>')
    return _svg(_grid(top) + "".join(marks) + _x_ticks(right, start), x_title, y_title)


def density(width: float, bins: int, cells: Sequence[tuple[int, int, float]], x_title: str, y_title: str) -> str:
    """Cells (x, y, share) of two equal axes, darker where there is more, with the diagonal."""
    top = bins * width
    most = max((share for *_, share in cells), default=1.0)
    marks = [f'<line class="diagonal" x1="{_x(0, top)}" y1="{_y(0, top)}" x2="{_x(top, top)}" y2="{_y(top, top)}"/>']
    w, h = _x(width, top) - _x(0, top), _y(0, top) - _y(width, top)
    for x, y, share in cells:
        low = [f"{place * width:.2g} to {(place + 1) * width:.2g}" for place in (x, y)]
        marks.append(
            f'<rect class="s0" x="{_x(x * width, top):.1f}" y="{_y((y + 1) * width, top):.1f}" width="{w:.1f}" '
            f'height="{h:.1f}" fill-opacity="{math.sqrt(share / most):.2f}">'
            f"<title>{escape(f'{low[0]}, then {low[1]} nats: {share:.2%}')}</title></rect>"
        )
    return _svg(_grid(top) + "".join(marks) + _x_ticks(top), x_title, y_title)


def _svg(inside: str, x_title: str, y_title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_title} by {x_title}")}">{inside}'
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 7}">{escape(x_title)}</text>'
        f'<text class="name start" x="2" y="10">{escape(y_title)}</text></svg>'
    )


def _x(value: float, right: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / right


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM - 8) * value / top


def _step(top: float) -> float:
    """1, 2 or 5 times a power of ten, three to six of which reach ``top``."""
    power = 10 ** math.floor(math.log10(top / 3))
    return next(factor * power for factor in (1, 2, 5, 10) if top / (factor * power) <= 6)


def _nice_top(values: Sequence[float]) -> float:
    """The end of an axis from 0 that holds the values: a little above the largest."""
    return max([*values, 1e-9]) * 1.04


def _ticks(top: float) -> list[float]:
    step = _step(top)
    return [step * number for number in range(int(top / step + 1e-9) + 1)]


def _grid(top: float) -> str:
    lines = []
    for value in _ticks(top):
        y = _y(value, top)
        lines.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick end" x="{LEFT - 5}" y="{y + 3.5:.1f}">{value:g}</text>')
    return "".join(lines)


def _x_ticks(right: float, start: float = 0.0) -> str:
    return "".join(
        f'<text class="tick" x="{_x(value, right):.1f}" y="{HEIGHT - BOTTOM + 14}">{start + value:g}</text>'
        for value in _ticks(right)
    )
