"""The charts of the probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from copra_fl.adapters.interpolation import Path
from copra_fl.reporting.figures.lines import add_lines
from copra_fl.reporting.html import STYLES, Figure, empty_chart

#: white is nothing
BLUES = [[0, "#ffffff"], [1, "#0072B2"]]
#: how a number is called and shown: its name on an axis, and the factor to the unit shown
UNITS = {"loss": ("loss", 1), "accuracy": ("accuracy, %", 100)}


def along_lines(paths: Mapping[str, Mapping[str, Path]], told: str) -> list[Figure]:
    """Loss and accuracy along the lines of each kind of path: pairs thin, their mean thick."""
    return [
        _along_lines(paths, "loss", f"A bump is a barrier. Thin: pairs; thick: their mean. {told}"),
        _along_lines(paths, "accuracy", f"A dip is a barrier. Thin: pairs; thick: their mean. {told}"),
    ]


def _along_lines(paths: Mapping[str, Mapping[str, Path]], metric: str, caption: str) -> Figure:
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": "u"}, {"title": unit})
    for (kind, of_pairs), style in zip(paths.items(), STYLES, strict=False):
        curves = {pair: [scale * value for value in getattr(path, metric)] for pair, path in of_pairs.items()}
        add_lines(chart, f"{kind} path", style, next(iter(of_pairs.values())).u, curves)
    return Figure(f"{metric.capitalize()} on the line", caption, chart)


def barriers(matrices: Mapping[str, np.ndarray], names: Sequence[str], told: str) -> list[Figure]:
    """The barrier of each pair as a heat map, one for each kind of path, in the same colours."""
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
            colorbar={"title": {"text": "barrier, loss", "side": "right"}, "thickness": 12},
            texttemplate="%{z:.3f}" if len(names) <= 8 else None,
            hovertemplate="%{y} – %{x}: %{z:.4g}<extra></extra>",
        )
        chart.update_layout(height=180 + 36 * len(names), margin={"t": 10}, showlegend=False)
        caption = f"White: no barrier. Barrier (Entezari) in loss on the {kind} path between each pair. {told}"
        figures.append(Figure(f"Barriers, {kind} path", caption, chart))
    return figures


def planes(
    values: Mapping[str, Sequence[Sequence[float]]], lattice: Sequence[float], names: Sequence[str], told: str
) -> list[Figure]:
    """Contours of each number on the plane through three adapters."""
    return [_plane(metric, cells, lattice, names, told) for metric, cells in values.items()]


def _plane(
    metric: str, cells: Sequence[Sequence[float]], lattice: Sequence[float], names: Sequence[str], told: str
) -> Figure:
    a, b, c = names
    unit, scale = UNITS[metric]
    chart = empty_chart({"title": f"u: from {a} to {b}"}, {"title": f"v: from {a} to {c}"})
    chart.add_contour(
        x=list(lattice),
        y=list(lattice),
        z=scale * np.array(cells),
        colorscale="Viridis" if metric == "accuracy" else "Viridis_r",
        colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
        line={"width": 0.5},
        hovertemplate="u = %{x:.2f}, v = %{y:.2f}: %{z:.4g}<extra></extra>",
    )
    look = {"color": "#000000", "size": 9}
    chart.add_scatter(
        x=[0, 1, 0, 0], y=[0, 0, 1, 0], mode="lines+markers", line={"color": "#000000"}, marker=look, hoverinfo="skip"
    )
    chart.add_scatter(x=[1 / 3], y=[1 / 3], mode="markers", marker=look | {"symbol": "x"}, hoverinfo="skip")
    for name, u, v in zip(names, (0, 1, 0), (0, 0, 1), strict=True):
        chart.add_annotation(x=u, y=v, text=name, bgcolor="rgba(255, 255, 255, 0.8)", showarrow=False, yshift=16)
    chart.update_layout(height=440, margin={"t": 10}, showlegend=False)
    caption = (
        f"The plane a + u (b - a) + v (c - a), factors and head alike; inside the triangle all weights 1 - u - v, u, v "
        f"are positive, × is the mean of the three. {told}"
    )
    return Figure(f"{metric.capitalize()} on the plane through three", caption, chart)


def merges(before: Mapping[str, float], after: Mapping[str, float], mean: float, told: str) -> list[Figure]:
    """Accuracy of each model before and after merging; a line at the mean of those before."""
    chart = empty_chart({"title": "accuracy, %"}, {"type": "category", "autorange": "reversed"})
    for name, values, style in (("before", before, STYLES[1]), ("merged", after, STYLES[0])):
        chart.add_bar(
            orientation="h",
            x=[100 * value for value in values.values()],
            y=list(values),
            name=name,
            marker={"color": style.color},
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )
    chart.add_vline(x=100 * mean, line={"dash": "dash", "width": 1})
    chart.update_layout(height=140 + 26 * (len(before) + len(after)), barmode="overlay")
    caption = f"Right of the dashed line, merging gave more than its parts have in the mean. {told}"
    return [Figure("Accuracy before and after merging", caption, chart, wide=True)]
