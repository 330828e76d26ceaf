"""Figures of the pages and of chart.png: numbers in, a matplotlib ``Figure`` out; ``svg`` and ``png`` write it.

A figure is 360 units wide, about as many pixels as a phone shows, so its words are as large there as the page's. It is
drawn in the colours of ``LIGHT``; in an SVG these become CSS variables, which base.html defines for light and dark.
matplotlib is slow to import, so commands import this module only when they draw.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

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
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
INK, DIM, RULE, CARD = (LIGHT[name] for name in ("ink", "dim", "rule", "card"))
COLOURS = [LIGHT[f"c{number}"] for number in range(8)]
MARKERS = "osD^vPX"  # one fewer than the colours, so that 56 pairs differ
WIDTH = 5.0  # inches of 72 units
WIDER = 4  # an interval that is wider than the narrowest by this factor leaves the figure
CHEAPER = 300  # a cost that is smaller than the largest by this factor stands at the left edge
STYLE: dict[Any, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False, "text.color": INK, "font.size": 11.5},
    **{"axes.edgecolor": DIM, "axes.labelcolor": DIM, "xtick.color": DIM, "ytick.color": DIM, "grid.color": RULE},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.left": False},
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.titlelocation": "left"},
    **{"axes.titlesize": 11.5, "figure.labelsize": 11.5, "xtick.labelsize": 11, "ytick.labelsize": 11},
    **{"legend.frameon": False, "legend.handlelength": 2.2, "lines.solid_capstyle": "butt"},
}

Series = Mapping[str, Sequence[float | None]]  # values by name; None draws nothing, but the others keep their colours


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
class Panel:
    """Rows, with a line through them at ``line`` and a dashed one at ``dashed``, where that is in sight."""

    title: str
    rows: Sequence[Row]
    line: float
    dashed: float | None = None


@dataclass(frozen=True)
class Line:
    """A curve; ``faint`` are the curves that it is the mean of, ``dots`` are points of it that matter."""

    style: int
    name: str
    points: Sequence[tuple[float, float]]
    faint: Sequence[Sequence[tuple[float, float]]] = ()
    dots: Sequence[tuple[float, float]] = ()
    dashed: bool = False


@matplotlib.rc_context(STYLE)
def intervals(panels: Sequence[Panel], caption: str = "") -> Figure:
    """Panels of dots with their intervals; a hollow dot has none. With a caption, the panels have their titles."""
    columns = min(3, len(panels))
    down = math.ceil(len(panels) / columns)
    caption = textwrap.fill(caption, 55 * columns)
    height = (0.6 if caption else 0.3) + 0.46 * max(len(panel.rows) for panel in panels)
    size = WIDTH * columns, height * down + 0.25 * len(caption.splitlines())
    figure = Figure(size, layout=ConstrainedLayoutEngine(w_pad=0.12 if caption else 0.04))
    figure.supxlabel(caption, color=DIM)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(down, columns, number)
        low, high = _limits(panel.rows, panel.line)
        axes.set(xlim=(low, high), ylim=(len(panel.rows) - 0.5, -0.65), yticks=[])
        axes.set_title(panel.title if caption else "", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.axvline(panel.line, color=DIM, linewidth=1)
        if panel.dashed is not None and low <= panel.dashed <= high:
            axes.axvline(panel.dashed, color=INK, linewidth=1, linestyle="--")
        for place, row in enumerate(panel.rows):
            look = _look(row.style)
            if row.low is None or row.high is None:
                look["markerfacecolor"] = CARD
            else:
                ends, seen = [max(low, row.low), min(high, row.high)], [low <= row.low, row.high <= high]
                cap: dict[str, Any] = {"marker": "|", "markevery": seen, "markersize": 9, "markeredgewidth": 2}
                axes.plot(ends, [place, place], color=look["color"], linewidth=2, **cap)
            axes.plot(row.mean, place, **look)
            box = {"facecolor": CARD, "linewidth": 0, "pad": 1}  # words stay legible where a line crosses them
            above: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom", "bbox": box}
            axes.text(0, place - 0.2, _short(row.name), **above)
            axes.text(1, place - 0.2, row.text, ha="right", **above)
    return figure


@matplotlib.rc_context(STYLE)
def lines(curves: Sequence[Line], x_label: str, y_label: str, log: bool = False) -> Figure:
    """Curves; ``log`` is of the horizontal axis."""
    figure, axes, handles = _new(x_label, y_label)
    for curve in curves:
        look = _look(curve.style)
        for points in curve.faint:
            axes.plot(*zip(*points, strict=True), color=look["color"], alpha=0.35, linewidth=1)
        dash = "--" if curve.dashed else "-"
        (line,) = axes.plot(*zip(*curve.points, strict=True), dash, **look, linewidth=2, markevery=[-1])
        handles[curve.name] = line
        for x, y in curve.dots:
            axes.plot(x, y, **look | {"markersize": 9})
    return _finished(figure, axes, handles, log)


@matplotlib.rc_context(STYLE)
def scatter(rows: Sequence[Row], costs: Sequence[tuple[float, float]], x_label: str, y_label: str) -> Figure:
    """Rows by their costs, by decades: filled with all of the scoring, hollow without, the interval upright.

    Of rows of equal cost each stands a little to the right of the last, so that all intervals can be seen.
    """
    figure, axes, handles = _new(x_label, y_label)
    low, high = axes.set_ylim(*_limits(rows))
    edge = max(map(max, costs)) / CHEAPER
    for number, (row, (full, training)) in enumerate(zip(rows, costs, strict=True)):
        look = _look(row.style)
        x = max(edge, full) * 1.03 ** costs[:number].count((full, training))
        if row.low is not None and row.high is not None:
            axes.plot([x, x], [max(low, row.low), min(high, row.high)], color=look["color"], linewidth=2)
        if training < full:
            axes.plot([max(edge, training), x], [row.mean] * 2, ":", color=look["color"])
            axes.plot(max(edge, training), row.mean, **look | {"markerfacecolor": CARD})
        (handles[row.name],) = axes.plot(x, row.mean, **look, linestyle="")
    return _finished(figure, axes, handles, log=True)


@matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"})
def bars(labels: Sequence[str], series: Series, x_label: str) -> Figure:
    """A group of level bars for each label, a bar for each series, each with its value."""
    thick = 0.84 / len(series)
    figure, axes, handles = _new(x_label, height=0.6 + 0.24 * len(labels) * max(1.3, len(series)))
    for style, (name, values) in enumerate(series.items()):
        for place, value in enumerate(values):
            if value is not None:
                y = place + thick * (style + 0.5) - 0.42
                handles[name] = axes.barh(y, value, 0.9 * thick, color=COLOURS[style], alpha=0.7)
                axes.annotate(f"{value:.2f}", (value, y), (3, 0), textcoords="offset points", va="center_baseline")
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    return _finished(figure, axes, handles)


@matplotlib.rc_context(STYLE)
def histogram(edges: Sequence[float], series: Series, x_label: str, y_label: str) -> Figure:
    """Percents by bins: an area for the first series, a line over it for the second; nothing for one without bins."""
    figure, axes, handles = _new(x_label, y_label)
    for style, (name, values) in enumerate(series.items()):
        if values:
            look: dict[str, Any] = {"linewidth": 2, "baseline": None} if style else {"fill": True, "alpha": 0.7}
            percents = [100 * (value or 0) for value in values]
            handles[name] = axes.stairs(percents, edges, color=COLOURS[style], **look)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
    return _finished(figure, axes, handles)


@matplotlib.rc_context(STYLE)
def density(squares: Iterable[tuple[float, float, float]], end: float, x_label: str, y_label: str) -> Figure:
    """Shares at places (x, y) of two like axes as squares of that area, with the diagonal."""
    figure, axes, handles = _new(x_label, y_label, height=4.6)
    x, y, shares = zip(*squares, strict=True)
    axes.scatter(x, y, [150 * share / max(shares) for share in shares], color=COLOURS[0], marker="s", linewidths=0)
    axes.plot([0, end], [0, end], "--", color=DIM, linewidth=1)
    axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    return _finished(figure, axes, handles)


@matplotlib.rc_context(STYLE)
def svg(figure: Figure, label: str) -> str:
    """The figure as an element of a page: words as text, colours as CSS variables; the same bytes each time."""
    for artist in figure.findobj():
        artist.set_clip_on(False)  # nothing sticks out, and clip paths would need addresses
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"\n\s*", " ", buffer.getvalue())
    text = re.sub(r"^.*?</defs>", "", text)  # the head: sizes, metadata, a style that would apply to the whole page
    text = re.sub(r"<[^>]*>", _themed, text)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{text}'


@matplotlib.rc_context(STYLE)
def png(figure: Figure) -> bytes:
    """The figure as a picture, light."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=CARD, metadata={"Software": None})
    return buffer.getvalue()


# --- parts -----------------------------------------------------------------------------------------------------------


def _themed(tag: re.Match[str]) -> str:
    """A tag with variables for colours, without fonts and without ids that another figure has too."""
    text = re.sub(r' id="[\w.]*_\d+"| font-family: [^;"]*;', "", tag[0].replace("xlink:href", "href"))
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: VARIABLES.get(colour[0], colour[0]), text)


def _new(x_label: str, y_label: str = "", height: float = 3.0) -> tuple[Figure, Axes, dict[str, Any]]:
    """A figure, its axes with the label of the vertical one above it, and artists by name for the legend."""
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_title(y_label, color=DIM)
    return figure, axes, {}


def _finished(figure: Figure, axes: Axes, handles: dict[str, Any], log: bool = False) -> Figure:
    """The figure with few ticks, and with a legend below where there is more than one name."""
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
    if len(handles) > 1:
        names = [textwrap.fill(name, 42) for name in handles]
        columns = max(1, min(3, 340 // (7 * max(map(len, names)) + 40)))
        height = 0.24 * sum(len(name.splitlines()) for name in names[::columns])
        figure.set_figheight(figure.get_figheight() + height)
        figure.legend(list(handles.values()), names, loc="outside lower left", ncols=columns)
    return figure


def _limits(rows: Sequence[Row], *others: float) -> tuple[float, float]:
    """Limits that hold all means, and all intervals but those so wide that nothing else could be seen."""
    known = [(row.low, row.high) for row in rows if row.low is not None and row.high is not None]
    means = [row.mean for row in rows]
    widest = max(WIDER * min((high - low for low, high in known), default=0.0), max(means) - min(means))
    ends = [*means, *others, *(end for low, high in known if high - low <= widest for end in (low, high))]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _look(style: int) -> dict[str, Any]:
    return {"color": COLOURS[style % len(COLOURS)], "marker": MARKERS[style % len(MARKERS)]}


def _short(name: str) -> str:
    """A name that fits beside its numbers: of a longer one, its ends tell more than its start."""
    return name if len(name) <= 24 else f"{name[:12]}…{name[-11:]}"
