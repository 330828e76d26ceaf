"""Figures of the pages: numbers in, a matplotlib ``Figure`` out; ``svg`` writes it.

A figure is 360 units wide, about as wide as a phone in pixels, so its text there is as large as that of the page. It is
drawn in the colours of ``LIGHT``; in an SVG these become CSS variables, which base.html defines for light and dark.
matplotlib is slow to import, so commands import this module only when they draw.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

LIGHT = {
    **{"paper": "#f7f7f5", "ink": "#1c1e21", "dim": "#5d636b", "rule": "#dcdfe3", "card": "#fefefe"},
    **{"c0": "#0072b2", "c1": "#b85c00", "c2": "#00805d", "c3": "#a8427f"},
    **{"c4": "#2b8cc4", "c5": "#7a6a00", "c6": "#c0392b", "c7": "#55595f"},
}
DARK = {
    **{"paper": "#131518", "ink": "#e6e8ea", "dim": "#9aa2ab", "rule": "#343a41", "card": "#1b1e22"},
    **{"c0": "#56a9e0", "c1": "#f2a33d", "c2": "#35c79d", "c3": "#e59bc6"},
    **{"c4": "#9ad6fb", "c5": "#d9cb52", "c6": "#ff8b70", "c7": "#bfc4ca"},
}
INK, DIM, CARD = LIGHT["ink"], LIGHT["dim"], LIGHT["card"]
COLOURS = [LIGHT[f"c{number}"] for number in range(8)]
MARKERS = "osD^vPX"  # one fewer than the colours, so that 56 pairs differ
WIDTH = 5.0  # inches of 72 units
WIDER = 4  # intervals more than this many times as wide as the narrowest one are cut off at the edge
CHEAPER = 300  # costs more than this many times smaller than the largest one are drawn at the left edge
STYLE: dict[Any, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False, "text.color": INK, "font.size": 11.5, "legend.frameon": False},
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), DIM),
    **{"grid.color": LIGHT["rule"]},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.left": False},
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.titlelocation": "left"},
    **{"axes.titlesize": 11.5, "xtick.labelsize": 11, "ytick.labelsize": 11},
    **{"errorbar.capsize": 4, "lines.linewidth": 2, "lines.markeredgewidth": 1.5, "lines.solid_capstyle": "butt"},
}

Series = Mapping[str, Sequence[float | None]]  # values by name; None leaves a gap


@dataclass(frozen=True)
class Row:
    """A mean and, where there is one, its interval. ``style`` numbers its colour and marker from 0."""

    style: int
    name: str
    mean: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Line:
    """A curve; ``faint`` are the curves of which it is the mean."""

    style: int
    name: str
    points: Sequence[tuple[float, float]]
    faint: Sequence[Sequence[tuple[float, float]]] = ()
    dashed: bool = False


@matplotlib.rc_context(STYLE)
def intervals(rows: Sequence[Row], line: float, dashed: float | None = None) -> Figure:
    """Dots with their intervals, a vertical line, and a dashed one that may lie outside of the figure.

    A hollow dot has no interval.
    """
    figure = Figure((WIDTH, 0.3 + 0.46 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=_limits(rows, line), ylim=(len(rows) - 0.5, -0.65), yticks=[])
    axes.locator_params(axis="x", nbins=5)
    axes.axvline(line, color=DIM, linewidth=1)
    if dashed is not None:
        axes.axvline(dashed, color=INK, linewidth=1, linestyle="--")
    for place, row in enumerate(rows):
        axes.errorbar(row.mean, place, xerr=_error(row), **_look(row.style, hollow=row.low is None))
        box = {"facecolor": CARD, "linewidth": 0, "pad": 1}  # text stays legible where a line crosses it
        write = partial(axes.text, y=place - 0.2, transform=axes.get_yaxis_transform(), va="bottom", bbox=box)
        write(0, s=row.name if len(row.name) < 25 else f"{row.name[:12]}…{row.name[-11:]}")
        write(1, s=row.text, ha="right")
    return figure


@matplotlib.rc_context(STYLE)
def lines(curves: Sequence[Line], x_label: str, y_label: str, log: bool = False) -> Figure:
    """Curves; ``log`` is for the horizontal axis."""
    figure, axes, legend = _new(x_label, y_label)
    for curve in curves:
        look, dash = _look(curve.style), "--" if curve.dashed else "-"
        for points in curve.faint:
            axes.plot(*zip(*points, strict=True), color=look["color"], alpha=0.35, linewidth=1)
        (legend[curve.name],) = axes.plot(*zip(*curve.points, strict=True), dash, **look, markevery=[-1])
    return _finished(figure, axes, legend, log)


@matplotlib.rc_context(STYLE)
def scatter(rows: Sequence[Row], costs: Sequence[tuple[float, float]], x_label: str, y_label: str) -> Figure:
    """Rows against their costs on a log axis: a filled mark with the whole scoring, a hollow mark without it.

    Rows of equal cost are moved apart a little, so that all intervals are visible.
    """
    figure, axes, legend = _new(x_label, y_label)
    known = [cost for pair in costs for cost in pair]
    edge = 0.85 * min(cost for cost in known if cost * CHEAPER > max(known))
    for number, (row, (full, training)) in enumerate(zip(rows, costs, strict=True)):
        x = max(edge, full) * 1.03 ** costs[:number].count((full, training))
        if training < full:
            axes.plot([max(edge, training), x], [row.mean] * 2, ":", **_look(row.style, hollow=True))
        legend[row.name] = axes.errorbar(x, row.mean, yerr=_error(row), linestyle="", **_look(row.style))
    axes.set_ylim(*_limits(rows))
    return _finished(figure, axes, legend, log=True)


@matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"})
def bars(labels: Sequence[str], series: Series, x_label: str) -> Figure:
    """A group of horizontal bars for each label, with a bar and its value for each series."""
    thick = 0.84 / len(series)
    figure, axes, legend = _new(x_label, height=0.6 + 0.24 * len(labels) * max(1.3, len(series)))
    for style, (name, values) in enumerate(series.items()):
        for place, value in enumerate(values):
            if value is not None:
                y = place + thick * (style + 0.5) - 0.42
                legend[name] = axes.barh(y, value, 0.9 * thick, color=COLOURS[style], alpha=0.7)
                axes.annotate(f"{value:.2f}", (value, y), (3, 0), textcoords="offset points", va="center_baseline")
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return _finished(figure, axes, legend)


@matplotlib.rc_context(STYLE)
def histogram(edges: Sequence[float], series: Series, x_label: str, y_label: str) -> Figure:
    """Percentages by bin: an area for the first series, a line for the second. A series without values is left out."""
    figure, axes, legend = _new(x_label, y_label)
    for style, (name, values) in enumerate(series.items()):
        if values:
            look: dict[str, Any] = {"linewidth": 2, "baseline": None} if style else {"fill": True, "alpha": 0.7}
            percents = [100 * (value or 0) for value in values]
            legend[name] = axes.stairs(percents, edges, color=COLOURS[style], **look)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
    return _finished(figure, axes, legend)


def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element, with text as text and colours as CSS variables; the same bytes each time."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": label}):  # ids are hashes of the content and this salt
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"\n\s*", " ", buffer.getvalue())
    text = re.sub(r"^.*?</defs>", "", text)  # the head: sizes, metadata, a style that would apply to the whole page
    text = re.sub(r"<[^>]*>", lambda tag: _themed(tag[0]), text)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{text}'


def _themed(tag: str) -> str:
    """A tag with variables for colours, without fonts, and without ids that other figures use too."""
    tag = re.sub(r' id="[\w.]*_\d+"| font-family: [^;"]*;', "", tag.replace("xlink:href", "href"))
    for name, colour in LIGHT.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag


def _new(x_label: str, y_label: str = "", height: float = 3.0) -> tuple[Figure, Axes, dict[str, Any]]:
    """A figure, its axes with ``y_label`` above them, and an empty legend: artists by name."""
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label)
    axes.set_title(y_label, color=DIM)
    return figure, axes, {}


def _finished(figure: Figure, axes: Axes, legend: dict[str, Any], log: bool = False) -> Figure:
    """The figure with few ticks, and with a legend below if the legend has more than one name."""
    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.locator_params(axis="x", nbins=6)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_view_interval()[1] >= 10_000:
            axis.set_major_formatter(EngFormatter())
    if len(legend) > 1:
        names = [textwrap.fill(name, 42) for name in legend]
        columns = max(1, min(3, 340 // (7 * max(map(len, names)) + 40)))
        height = 0.24 * sum(len(name.splitlines()) for name in names[::columns])
        figure.set_figheight(figure.get_figheight() + height)
        figure.legend(list(legend.values()), names, loc="outside lower left", ncols=columns)
    return figure


def _limits(rows: Sequence[Row], *others: float) -> tuple[float, float]:
    """Limits that include all means, and all intervals except very wide ones."""
    known = [(row.low, row.high) for row in rows if row.low is not None and row.high is not None]
    means = [row.mean for row in rows]
    widest = max(WIDER * min((high - low for low, high in known), default=0.0), max(means) - min(means))
    ends = [*means, *others, *(end for low, high in known if high - low <= widest for end in (low, high))]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _error(row: Row) -> list[list[float]] | None:
    """Lengths of the interval below and above the mean."""
    return None if row.low is None or row.high is None else [[row.mean - row.low], [row.high - row.mean]]


def _look(style: int, hollow: bool = False) -> dict[str, Any]:
    colour = COLOURS[style % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[style % len(MARKERS)], "markerfacecolor": CARD if hollow else colour}
