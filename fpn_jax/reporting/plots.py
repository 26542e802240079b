"""The pictures of a report, as PNG. All values are in percent or points.

Each takes {row of the sweep: ...}; a row has one colour, marker and line in all of them, the baseline being black. With
more rows than colours (Okabe and Ito's, which colour-blind people tell apart) lines become dashed and bars hatched.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fpn_jax.reporting.statistics import Difference, Summary

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))
_HATCHES = (None, "////", "....")
_WIDTH, _DPI = 9.0, 96  # 864 pixels, about as many as a README shows
_GRID = {"alpha": 0.25, "linewidth": 0.7}
_in_house_style = matplotlib.rc_context(
    {"font.size": 9.5, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False}
)


@dataclass(frozen=True)
class Style:
    """How a row is drawn."""

    color: str
    marker: str
    dashes: Any
    hatch: str | None = None
    width: float = 1.6


Styles = Mapping[str, Style]


def styles(rows: Sequence[str], baseline: str) -> dict[str, Style]:
    """{row: style} for the rows in the order of the sweep."""
    others = [row for row in rows if row != baseline]
    kinds = zip(_DASHES, _HATCHES, strict=True), zip(_COLORS, _MARKERS, strict=True)
    looks = [Style(color, marker, dashes, hatch) for (dashes, hatch), (color, marker) in itertools.product(*kinds)]
    found = dict(zip(others, itertools.cycle(looks), strict=False))
    return {row: found.get(row, Style("black", "o", "-", width=2.4)) for row in rows}


@dataclass(frozen=True)
class Change:
    """What a row differs from the baseline by, here and in the paper."""

    here: Difference | None
    paper: float | None


@_in_house_style
def differences(panels: Mapping[str, Mapping[str, Change]], looks: Styles) -> bytes:
    """A panel for each metric {metric: {row: change}}: mean, interval, single seeds, and the paper's difference."""
    rows = list(next(iter(panels.values())))
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure, grid = _figure(height, columns, height * (0.85 + 0.27 * len(rows)) + 0.4, sharey=True)
    for axes, (metric, changes) in zip(grid, panels.items(), strict=False):
        limits = _limits(list(changes.values()))
        axes.axvline(0, color="black", linewidth=1.2)
        for y, row in enumerate(rows):
            _change(axes, y, changes[row], looks[row].color, limits)
        axes.set_xlim(limits)
        axes.set_title(f"{metric}, points")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.grid(axis="x", **_GRID)
        axes.tick_params(axis="y", length=0, pad=8)
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
    keys = _change_keys([change for changes in panels.values() for change in changes.values()])
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False)
    return _png(figure)


def _change_keys(changes: Sequence[Change]) -> list[Line2D]:
    """What a legend must explain of the changes drawn."""
    here = [change.here for change in changes if change.here]
    keys = [Line2D([], [], color="#444444", marker="o", linewidth=0, markersize=6, label="difference of one seed")]
    if any(difference.n > 1 for difference in here):
        single = Line2D([], [], color="#444444", marker="o", linewidth=0, markersize=3, alpha=0.5, label="one seed")
        keys = [Line2D([], [], color="#444444", marker="o", lw=3, markersize=6, label="mean, 95 % interval"), single]
    if any(change.paper is not None for change in changes):
        keys.append(_paper(label="in the paper"))
    return keys


def _limits(changes: Sequence[Change]) -> tuple[float, float]:
    """Room for every point, and for intervals as far as they do not squeeze the points: with two seeds t is 12.7."""
    points = [
        0.0,
        *(x for c in changes if c.here for x in c.here.each),
        *(c.paper for c in changes if c.paper is not None),
    ]
    ends = [end for c in changes if c.here and c.here.interval for end in c.here.interval]
    low, high = min(points), max(points)
    span = (high - low) or 1.0
    left, right = max(min([low, *ends]), low - span / 2), min(max([high, *ends]), high + span / 2)
    return left - 0.06 * span, right + 0.06 * span


def _change(axes: Axes, y: float, change: Change, color: str, limits: tuple[float, float]) -> None:
    if change.here is not None:
        if change.here.interval is not None:
            low, high = change.here.interval
            axes.plot([low, high], [y, y], color=color, linewidth=3, alpha=0.55, solid_capstyle="butt")
            for end, beyond, marker in ((0, low < limits[0], "<"), (1, high > limits[1], ">")):
                if beyond:
                    axes.plot(limits[end], y, marker, color=color, markersize=7, clip_on=False)
        if change.here.n > 1:
            axes.plot(change.here.each, [y + 0.27] * change.here.n, "o", color=color, markersize=3, alpha=0.5)
        axes.plot(change.here.mean, y, "o", color=color, markersize=6)
    if change.paper is not None:
        axes.add_line(_paper(x=[change.paper], y=[y]))


def _paper(x: Sequence[float] = (), y: Sequence[float] = (), label: str = "") -> Line2D:
    return Line2D(x, y, marker="D", markersize=6, markerfacecolor="none", markeredgecolor="black", lw=0, label=label)


@_in_house_style
def lines(
    panels: Mapping[str, Mapping[str, Mapping[Any, Summary]]], places: Mapping[Any, str], looks: Styles, xlabel: str
) -> bytes:
    """A panel for each title {title: {row: {place: summary}}}: a line for each row over places {place: its name}.

    The first panel starts at zero, the others where their values do.
    """
    figure, grid = _figure(1, len(panels), 3.6, sharey=False)
    index = {place: i for i, place in enumerate(places)}
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        shift = min(0.09, 0.5 / len(rows))  # side by side, so that the error bars can be told apart
        for i, (row, summaries) in enumerate(rows.items()):
            x = [index[place] + shift * (i - (len(rows) - 1) / 2) for place in summaries]
            _error_line(axes, x, list(summaries.values()), looks[row], row)
        axes.set_title(title)
        axes.set_xticks(range(len(places)), list(places.values()), fontsize=8.5)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(xlabel)
        axes.grid(axis="y", **_GRID)
        axes.axhline(0, color="black", linewidth=0.8)
    grid[0].set_ylim(bottom=0)
    _row_legend(figure, grid[0])
    return _png(figure)


def _error_line(axes: Axes, x: Sequence[float], values: Sequence[Summary], look: Style, label: str) -> None:
    axes.errorbar(
        x,
        [s.mean for s in values],
        [s.std or 0.0 for s in values],
        color=look.color,
        marker=look.marker,
        linestyle=look.dashes,
        linewidth=look.width,
        markersize=5,
        elinewidth=1,
        capsize=2,
        label=_label(label),
    )


@_in_house_style
def bars(panels: Mapping[str, Mapping[str, Mapping[str, Summary]]], looks: Styles, ylabel: str) -> bytes:
    """A panel for each title {title: {row: {kind: summary}}}: a group of bars for each kind, a bar for each row.

    Side by side and not stacked: what mending one kind of error gains says nothing of what mending two would.
    """
    kinds = {title: list(dict.fromkeys(k for row in rows.values() for k in row)) for title, rows in panels.items()}
    figure, grid = _figure(1, len(panels), 3.3, sharey=False, width_ratios=[len(k) + 0.6 for k in kinds.values()])
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        width, lowest = 0.84 / len(rows), 0.0
        for i, (row, summaries) in enumerate(rows.items()):
            x = [kinds[title].index(kind) + width * (i - (len(rows) - 1) / 2) for kind in summaries]
            heights = [s.mean for s in summaries.values()]
            spread = {"yerr": [s.std or 0.0 for s in summaries.values()], "error_kw": {"linewidth": 1}}
            paint = {"facecolor": looks[row].color, "edgecolor": "white", "hatch": looks[row].hatch, "linewidth": 0}
            axes.bar(x, heights, 0.9 * width, label=_label(row), **paint, **spread)
            lowest = min([lowest, *heights])
        axes.set_ylim(bottom=0 if lowest >= 0 else None)
        axes.set_title(title)
        axes.set_xticks(range(len(kinds[title])), kinds[title])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", **_GRID)
        axes.set_axisbelow(True)
    grid[0].set_ylabel(ylabel)
    _row_legend(figure, grid[0])
    return _png(figure)


@_in_house_style
def stacks(panels: Mapping[str, Mapping[str, Mapping[int, Summary]]]) -> bytes:
    """A panel for each title {title: {row: {level: summary}}}: for each row a bar of 100 %, divided into levels."""
    levels = sorted({level for rows in panels.values() for shares in rows.values() for level in shares})
    shades = dict(zip(levels, matplotlib.colormaps["cividis"](np.linspace(0.05, 0.95, len(levels))), strict=True))
    rows = list(dict.fromkeys(row for of_panel in panels.values() for row in of_panel))
    figure, grid = _figure(1, len(panels), 1.35 + 0.32 * len(rows), sharey=True)
    for axes, (title, shares) in zip(grid, panels.items(), strict=True):
        for y, row in enumerate(rows):
            left = 0.0
            for level, summary in sorted(shares.get(row, {}).items()):
                axes.barh(y, summary.mean, 0.74, left=left, color=shades[level], edgecolor="white", linewidth=0.6)
                if summary.mean >= 11:
                    ink = "white" if np.dot(shades[level][:3], (0.299, 0.587, 0.114)) < 0.55 else "black"
                    x = left + summary.mean / 2
                    axes.text(x, y, f"{summary.mean:.0f}", ha="center", va="center", color=ink, fontsize=8.5)
                left += summary.mean
        axes.set_title(title)
        axes.set_xlim(0, 100)
        axes.set_xlabel("percent")
        axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    keys = [Line2D([], [], marker="s", markersize=9, lw=0, color=shades[k], label=f"level {k}") for k in levels]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    return _png(figure)


@_in_house_style
def curves(rows: Mapping[str, Mapping[int, Summary]], looks: Styles, ylabel: str) -> bytes:
    """A line {row: {step: summary}} for each row, and a band of one standard deviation to either side."""
    figure, (axes,) = _figure(1, 1, 3.9, sharey=False)
    for row, summaries in rows.items():
        look, steps = looks[row], list(summaries)
        mean = np.array([s.mean for s in summaries.values()])
        std = np.array([s.std or 0.0 for s in summaries.values()])
        if std.any():
            axes.fill_between(steps, mean - std, mean + std, color=look.color, alpha=0.14, linewidth=0)
        # A marker on each of hundreds of points would be a sausage.
        marks = {"marker": look.marker, "markersize": 4.5, "markevery": max(1, len(steps) // 12)}
        axes.plot(
            steps, mean, color=look.color, linestyle=look.dashes, linewidth=look.width, label=_label(row), **marks
        )
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(**_GRID)
    _row_legend(figure, axes)
    return _png(figure)


def _figure(
    lines: int, columns: int, height: float, sharey: bool, width_ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharey=sharey, squeeze=False, width_ratios=width_ratios)
    return figure, list(grid.flat)


def _row_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=1)
    columns = max(1, min(len(labels), 110 // (longest + 7)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _label(name: str) -> str:
    return name.replace("$", r"\$")  # matplotlib would set what is between two of them as a formula


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        if not axes.has_data():
            axes.remove()
    file = io.BytesIO()
    # The version of matplotlib would make a difference in git where there is none to see.
    figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return file.getvalue()
