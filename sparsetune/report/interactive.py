"""Charts as Plotly figures (JSON values); the page's scripts set colours by each trace's role, in `meta`."""

from typing import Any

from sparsetune.report.charts import Axis, Bars, Chart, HeatMap, Plot, Series, extent

_MARGIN = {"l": 64, "r": 16, "t": 8, "b": 56}


def plotly_figure(chart: Chart) -> dict[str, Any]:
    if isinstance(chart, Plot):
        return _plot(chart)
    return _heat_map(chart) if isinstance(chart, HeatMap) else _bars(chart)


def _plot(chart: Plot) -> dict[str, Any]:
    named: set[str] = set()
    clickable = any(series.ids for series in chart.series)
    data = []
    for series in chart.series:
        trace = _trace(series, chart, shown=series.name not in named)
        if clickable and not series.ids:  # otherwise a line takes the click on its points
            del trace["hovertemplate"]
            trace["hoverinfo"] = "skip"
        data.append(trace)
        named.add(series.name)
    x_axis = _axis(chart.x)
    low, high = extent([value for series in chart.series for value in series.x])
    if chart.x.whole and high - low < 10:  # otherwise Plotly labels halves too
        x_axis["dtick"] = 1
    return {"data": data, "layout": _layout(x_axis, _axis(chart.y)) | {"hovermode": "closest"}}


def _trace(series: Series, chart: Plot, *, shown: bool) -> dict[str, Any]:
    lone = len([value for value in series.y if value is not None]) < 2
    x_form, y_form = (":.1%" if axis.percent else ":.4~g" for axis in (chart.x, chart.y))
    note = "%{text}<br>" if series.notes else ""
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines" if series.line and not lone else "markers",
        "name": series.name,
        "meta": series.role,
        "x": list(series.x),
        "y": list(series.y),
        "showlegend": shown,
        "hovertemplate": f"{note}{chart.x.title}: %{{x{x_form}}}<br>{chart.y.title}: %{{y{y_form}}}<extra></extra>",
    }
    if series.step:
        trace["line"] = {"shape": "hv"}
    if series.ids:
        trace["customdata"] = list(series.ids)
    if series.notes:
        trace["text"] = list(series.notes)
    return trace


def _heat_map(chart: HeatMap) -> dict[str, Any]:
    trace = {
        "type": "heatmap",
        "x": list(chart.x.labels),
        "y": list(chart.y.labels),
        "z": [list(row) for row in chart.values],
        "zmin": 0.0,
        "colorscale": "Viridis",
        "colorbar": {"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
        "hovertemplate": f"{chart.y.title} %{{y}}, {chart.x.title} %{{x}}: %{{z:.1%}}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    category = {"type": "category"}
    y_axis = _axis(chart.y) | category | {"autorange": "reversed"}
    return {"data": [trace], "layout": _layout(_axis(chart.x) | category, y_axis)}


def _bars(chart: Bars) -> dict[str, Any]:
    form = ":.1%" if chart.axis.percent else ":.2f"
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "meta": role,
            "x": list(values),
            "y": list(chart.labels),
            "texttemplate": f"%{{x{form}}}",
            "textposition": "auto",
            "hovertemplate": f"{'%{fullData.name}' if len(chart.parts) > 1 else '%{y}'}: %{{x{form}}}<extra></extra>",
        }
        for name, role, values in chart.parts
    ]
    y_axis = {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False}
    height = 110 + 34 * len(chart.labels) + (30 if len(chart.parts) > 1 else 0)
    more = {"barmode": "stack", "showlegend": len(chart.parts) > 1, "height": height}
    return {"data": data, "layout": _layout(_axis(chart.axis), y_axis) | more}


def _axis(axis: Axis) -> dict[str, Any]:
    form: dict[str, Any] = {"title": {"text": axis.title}, "automargin": True, "zeroline": False}
    if axis.percent:
        form["tickformat"] = ".0%"
    if axis.log:
        form |= {"type": "log", "exponentformat": "power", "nticks": 4}
    return form


def _layout(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    legend = {"orientation": "h", "traceorder": "normal", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return {"xaxis": x, "yaxis": y, "margin": dict(_MARGIN), "height": 380, "legend": legend}
