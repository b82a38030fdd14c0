"""Charts as PNG images, drawn by matplotlib."""

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetune.files import atomic_path
from sparsetune.report.charts import Axis, Bars, Chart, HeatMap, Plot, Role, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: dict[Role, str] = {
    "main": "#2563b0",
    "second": "#c2571a",
    "third": "#3d7a5a",
    "best": "#b3226b",
    "muted": "#8a919c",
    "bad": "#c62828",
}
"""Distinguishable with colour blindness, and by their markers."""

_MARKERS: dict[Role, str] = {"main": "o", "second": "s", "third": "o", "best": "*", "muted": "x", "bad": "v"}
_DPI = 110


def save_pictures(charts: tuple[Chart, ...], folder: Path) -> tuple[Path, ...]:
    """Write each chart to `NAME.png`; texts must be in Latin letters, which matplotlib's font has."""
    return tuple(_save(chart, folder / f"{chart.name}.png") for chart in charts)


def _save(chart: Chart, path: Path) -> Path:
    figure = draw(chart)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, metadata={"Description": chart.alt})
    return path


def draw(chart: Chart) -> "Figure":
    """Draw a chart as a figure of matplotlib, without pyplot's state or window; notebooks show it as an image."""
    from matplotlib.figure import Figure

    # fixed margins: computing them costs matplotlib as much as drawing
    height, left = 4.2, 0.09
    if isinstance(chart, Bars):
        height, left = 1.5 + 0.45 * len(chart.labels), 0.03 + 0.011 * max(len(label) for label in chart.labels)
    figure = Figure(figsize=(8.0, height))
    axes = figure.add_axes((left, 0.55 / height, 0.97 - left, 1.0 - 1.2 / height))
    if isinstance(chart, Plot):
        _plot(chart, axes)
    elif isinstance(chart, HeatMap):
        _heat_map(chart, axes, figure)
    else:
        _bars(chart, axes)
    axes.set_title(chart.title, loc="left", x=0.0, y=1.0 + 0.27 / (height - 1.2), fontsize=11, fontweight="bold")
    figure._repr_png_ = functools.partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=_DPI)
    return content.getvalue()


def _plot(chart: Plot, axes: "Axes") -> None:
    named: set[str] = set()
    for series in chart.series:
        _series(series, axes, None if series.name in named else series.name)
        named.add(series.name)
    _format_axis(chart.x, axes.xaxis)
    _format_axis(chart.y, axes.yaxis)
    if chart.x.log:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if len(named) > 1:
        _legend(axes, len(named))
    axes.spines[["top", "right"]].set_visible(False)


def _series(series: Series, axes: "Axes", label: str | None) -> None:
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if x is not None and y is not None]
    if not pairs:
        return
    x, y = zip(*pairs, strict=True)
    colour, muted = COLOURS[series.role], series.role == "muted"
    if series.line and len(pairs) > 1:
        style = "steps-post" if series.step else "default"
        axes.plot(x, y, color=colour, label=label, drawstyle=style, lw=1.0 if muted else 1.8, alpha=0.7 if muted else 1)
    else:
        size = 140 if series.role == "best" else 36
        front = 3 if series.role in ("best", "bad") else 2
        axes.scatter(x, y, color=colour, label=label, marker=_MARKERS[series.role], s=size, zorder=front)


def _heat_map(chart: HeatMap, axes: "Axes", figure: Any) -> None:
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    values = np.array([[np.nan if value is None else value for value in row] for row in chart.values], dtype=np.float64)
    drawn = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, interpolation="nearest")
    _format_axis(chart.x, axes.xaxis)
    _format_axis(chart.y, axes.yaxis)
    figure.colorbar(drawn, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.02)


def _bars(chart: Bars, axes: "Axes") -> None:
    positions = list(range(len(chart.labels)))
    left = [0.0] * len(positions)
    for name, role, values in chart.parts:
        form = "{:.1%}" if chart.axis.percent else "{:.2f}"
        label = f"{name} {form.format(values[0])}" if len(positions) == 1 else name
        drawn = axes.barh(positions, values, left=left, color=COLOURS[role], label=label, height=0.6)
        if len(chart.parts) == 1:
            axes.bar_label(drawn, [form.format(value) for value in values], padding=4, fontsize=8)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(positions, chart.labels)
    axes.invert_yaxis()
    _format_axis(chart.axis, axes.xaxis)
    axes.margins(x=0.12 if len(chart.parts) == 1 else 0.0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.parts) > 1:
        _legend(axes, len(chart.parts))


def _legend(axes: "Axes", columns: int) -> None:
    anchor: Any = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(fontsize=8, ncols=columns, frameon=False, **anchor)


def _format_axis(axis: Axis, drawn: Any) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawn.set_label_text(axis.title)
    if axis.whole:
        drawn.set_major_locator(MaxNLocator(integer=True))
    if axis.percent:
        drawn.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if axis.labels:
        positions = range(0, len(axis.labels), max(1, len(axis.labels) // 16))
        drawn.set_ticks(list(positions), labels=[axis.labels[position] for position in positions])
