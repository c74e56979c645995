"""The charts of the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from copra_fl.adapters.interpolation import LossPath
from copra_fl.reporting.figures.lines import add_lines
from copra_fl.reporting.html import STYLES, Figure, colorbar, empty_chart

#: color scale from 0 (white) upwards
BLUES = [[0, "#ffffff"], [1, "#0072B2"]]
#: metric -> name on an axis, and factor to the unit shown
UNITS = {"loss": ("loss", 1), "accuracy": ("accuracy, %", 100)}


def along_lines(paths: Mapping[str, Mapping[str, LossPath]], setting: str) -> list[Figure]:
    """Return charts of loss and accuracy along the lines of each kind of path: pairs thin, their mean thick."""
    return [
        _along_lines(paths, "loss", f"A rise between the ends is a barrier. Thin: pairs; thick: mean. {setting}"),
        _along_lines(paths, "accuracy", f"A dip between the ends is a barrier. Thin: pairs; thick: mean. {setting}"),
    ]


def _along_lines(paths: Mapping[str, Mapping[str, LossPath]], metric: str, caption: str) -> Figure:
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": "u"}, {"title": unit})
    for (kind, path_by_pair), style in zip(paths.items(), STYLES, strict=False):
        curves = {pair: [scale * value for value in getattr(path, metric)] for pair, path in path_by_pair.items()}
        add_lines(chart, f"{kind} path", style, next(iter(path_by_pair.values())).u, curves)
    return Figure(f"{metric.capitalize()} on the line", caption, chart)


def barriers(matrices: Mapping[str, np.ndarray], names: Sequence[str], setting: str) -> list[Figure]:
    """Return a heat map of the pairs' barriers for each kind of path, all on one color scale."""
    highest = max(float(np.nanmax(cells)) for cells in matrices.values())
    figures = []
    for kind, cells in matrices.items():
        chart = empty_chart({"type": "category", "showgrid": False}, {"type": "category", "autorange": "reversed"})
        chart.add_heatmap(
            x=list(names),
            y=list(names),
            z=cells,
            zmin=0,
            zmax=highest or 1,
            colorscale=BLUES,
            colorbar=colorbar("barrier, loss"),
            texttemplate="%{z:.3f}" if len(names) <= 8 else None,
            hovertemplate="%{y} – %{x}: %{z:.4g}<extra></extra>",
        )
        chart.update_layout(height=180 + 36 * len(names), margin={"t": 10}, showlegend=False)
        caption = f"Barrier (Entezari) of the loss on the {kind} path between each pair; white: none. {setting}"
        figures.append(Figure(f"Barriers, {kind} path", caption, chart))
    return figures


def planes(
    values: Mapping[str, Sequence[Sequence[float]]], lattice: Sequence[float], names: Sequence[str], setting: str
) -> list[Figure]:
    """Return contours of each metric on the plane through three adapters."""
    return [_plane(metric, cells, lattice, names, setting) for metric, cells in values.items()]


def _plane(
    metric: str, cells: Sequence[Sequence[float]], lattice: Sequence[float], names: Sequence[str], setting: str
) -> Figure:
    a, b, c = names
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": f"u: from {a} to {b}"}, {"title": f"v: from {a} to {c}"})
    chart.add_contour(
        x=list(lattice),
        y=list(lattice),
        z=scale * np.array(cells),
        colorscale="Viridis" if metric == "accuracy" else "Viridis_r",
        colorbar=colorbar(unit),
        line={"width": 0.5},
        hovertemplate="u = %{x:.2f}, v = %{y:.2f}: %{z:.4g}<extra></extra>",
    )
    marker = {"color": "#000000", "size": 9}
    chart.add_scatter(
        x=[0, 1, 0, 0], y=[0, 0, 1, 0], mode="lines+markers", line={"color": "#000000"}, marker=marker, hoverinfo="skip"
    )
    chart.add_scatter(x=[1 / 3], y=[1 / 3], mode="markers", marker=marker | {"symbol": "x"}, hoverinfo="skip")
    for name, u, v in zip(names, (0, 1, 0), (0, 0, 1), strict=True):
        chart.add_annotation(x=u, y=v, text=name, bgcolor="rgba(255, 255, 255, 0.8)", showarrow=False, yshift=16)
    chart.update_layout(height=440, margin={"t": 10}, showlegend=False)
    caption = (
        f"The plane a + u (b - a) + v (c - a), for factors and head. Inside the triangle the weights 1 - u - v, u and "
        f"v are all positive; × is the mean of the three. {setting}"
    )
    return Figure(f"{metric.capitalize()} on the plane through three", caption, chart)


def merges(
    before: Mapping[str, tuple[float, float, float]],
    after: Mapping[str, tuple[float, float, float]],
    mean: float,
    setting: str,
) -> list[Figure]:
    """Return a chart of accuracy before and after merging, with a line at the mean before.

    `before` and `after` are name -> accuracy, lower and upper end of its interval.
    """
    chart = empty_chart({"title": "accuracy, %"}, {"type": "category", "autorange": "reversed"})
    for name, scores, style in (("before", before, STYLES[1]), ("merged", after, STYLES[0])):
        accuracy, low, high = 100 * np.array(list(scores.values())).T
        chart.add_scatter(
            x=accuracy,
            y=list(scores),
            error_x={"array": high - accuracy, "arrayminus": accuracy - low},
            name=name,
            mode="markers",
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    chart.add_vline(x=100 * mean, line={"dash": "dash", "width": 1})
    chart.update_layout(height=140 + 26 * (len(before) + len(after)))
    caption = (
        "Dashed line: mean accuracy of the models before merging; a merge to its right is better. Bars, for one data "
        f"set: 95 % interval (Wilson). {setting}"
    )
    return [Figure("Accuracy before and after merging", caption, chart, wide=True)]
