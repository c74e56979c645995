"""What averaging loses and gains: the aggregation error, the merge gap, the line between two clients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from copra_fl.adapters.state import by_number
from copra_fl.reporting.figures.canvas import are_many, by_method, by_round, legended, started
from copra_fl.reporting.html import Figure
from copra_fl.reporting.results import Comparison
from copra_fl.wording import join_words

#: in percent: below it an error is float32's rounding, and the rule exact
ROUNDING = 1e-4
#: errors that are further apart than this factor are shown on a logarithmic axis
FAR_APART = 30


def aggregation_error(comparison: Comparison) -> list[Figure]:
    """How far the new global product is from the average of the clients' products, by round."""
    caption = (
        "How far the next global adapter's B A is from the weighted average of the clients' B A, relative, over all "
        "layers. Lower is closer to what the clients trained, which need not be a better model. Exact: below "
        f"{ROUNDING:g} %, float32's rounding."
    )
    figures = by_round(
        comparison,
        lambda row: 100 * row["aggregation_error"]["total"] if row.get("aggregation_error") else None,
        "Aggregation error by round",
        caption,
        {"title": "error, %", "rangemode": "tozero"},
    )
    for figure in figures:
        _make_logarithmic(figure.chart)
    return figures


def _make_logarithmic(chart: go.Figure) -> None:
    """Where errors are far apart, or only rounding; what is below rounding is drawn on a line called "exact"."""
    values = [value for trace in chart.data for value in trace.y]
    low, high = min(values), max(values)
    if ROUNDING < high <= FAR_APART * low:
        return
    floor = ROUNDING if low <= ROUNDING else 10.0 ** math.floor(math.log10(low))
    for trace in chart.data:
        trace.customdata = trace.y
        trace.y = [max(floor, value) for value in trace.y]
        if trace.hovertemplate:
            trace.hovertemplate = "round %{x}: %{customdata:.3g} %"
    bottom, top = math.log10(floor), math.log10(max(high, 1.0))
    decades = range(round(bottom), math.ceil(top) + 1)
    labels = [f"{10.0**decade:g}" for decade in decades]
    if floor == ROUNDING:
        labels[0] = "exact"
    ticks = {"tickvals": [10.0**decade for decade in decades], "ticktext": labels}
    chart.update_yaxes(type="log", range=[bottom - 0.25, top + 0.15], **ticks)


def error_by_layer(comparison: Comparison) -> list[Figure]:
    """The aggregation error of the last round, layer by layer: a row a method."""
    found = {}
    for method, runs, _ in started(comparison):
        errors = [run.journal[-1].get("aggregation_error") for run in runs if run.journal]
        layers = [error["layers"] for error in errors if error]
        if layers:
            found[method] = {name: 100 * float(np.mean([each[name] for each in layers])) for name in layers[0]}
    if not found:
        return []
    modules = sorted(next(iter(found.values())), key=by_number)
    cells = [[errors.get(module) for module in modules] for errors in found.values()]
    chart = by_method(comparison, {"title": "layer"})
    chart.add_heatmap(
        x=_short(modules),
        y=list(found),
        z=cells,
        customdata=[modules] * len(found),
        zmin=0,
        zmax=max(1.0, *(error for row in cells for error in row if error is not None)),
        colorscale=[[0, "#ffffff"], [1, "#0072B2"]],
        colorbar={"title": {"text": "error, %", "side": "right"}, "thickness": 12},
        texttemplate="%{z:.0f}" if len(modules) <= 24 else None,
        textfont={"size": 11},
        hovertemplate="%{y}, %{customdata}: %{z:.3g} %<extra></extra>",
    )
    chart.update_xaxes(type="category", showgrid=False)
    chart.update_yaxes(showgrid=False)
    chart.update_layout(height=chart.layout.height + 100, margin={"t": 10})
    caption = f"White: nothing is lost in averaging this layer. After the last round, mean of {comparison.named_seeds}."
    return [Figure("Aggregation error by layer", caption, chart, wide=are_many(comparison))]


def _short(modules: list[str]) -> list[str]:
    """Module names without the parts that all of them have: ``encoder.layer.0.attention.self.query`` as ``0.query``."""
    common = set.intersection(*(set(module.split(".")) for module in modules))
    return [".".join(part for part in module.split(".") if part not in common) or module for module in modules]


def merge_gaps(comparison: Comparison) -> list[Figure]:
    """What averaging gained over the clients it averaged, by round."""
    what = "of the averaged model minus the weighted mean of the clients' own, on the server's validation data."
    return [
        *by_round(
            comparison,
            lambda row: 100 * row["merge_gap"]["accuracy"] if row.get("merge_gap") else None,
            "Merge gap in accuracy",
            f"Above 0, averaging helped: accuracy {what}",
            {"title": "points", "rangemode": "tozero"},
        ),
        *by_round(
            comparison,
            lambda row: row["merge_gap"]["loss"] if row.get("merge_gap") else None,
            "Merge gap in loss",
            f"Below 0, averaging helped: loss {what}",
            {"title": "loss", "rangemode": "tozero"},
        ),
    ]


def connectivity(comparison: Comparison) -> list[Figure]:
    """Loss and accuracy along the straight lines between pairs of clients."""
    what = (
        "after the last round, from the adapter and head of one (u = 0) to those of the other (u = 1), A and B "
        f"interpolated apart (factor path). Server's validation data, {comparison.named_seeds}."
    )
    lines = (
        "Means over pairs of clients" if are_many(comparison) else "Thin lines: pairs of clients; thick: their mean;"
    )
    return [
        *_along_lines(comparison, "loss", "Loss on the line", f"A bump is a barrier. {lines} {what}", "loss"),
        *_along_lines(
            comparison, "accuracy", "Accuracy on the line", f"A dip is a barrier. {lines} {what}", "accuracy, %"
        ),
    ]


def _along_lines(comparison: Comparison, metric: str, title: str, caption: str, unit: str) -> list[Figure]:
    chart = legended(comparison, {"title": "u"}, {"title": unit})
    scale, many = 100 if metric == "accuracy" else 1, are_many(comparison)
    for method, _, style in started(comparison):
        lines = [(seed, line) for seed, end in comparison.finished(method) for line in end["paths"]]
        for seed, line in [] if many else lines:
            chart.add_scatter(
                x=line["u"],
                y=scale * np.array(line[metric]),
                name=method,
                legendgroup=method,
                showlegend=False,
                mode="lines",
                line={"color": style.colour, "width": 1},
                opacity=0.5,
                hovertemplate=f"seed {seed}, clients {join_words(line['clients'])}: %{{y:.4g}}",
            )
        if lines:
            look: dict[str, Any] = {"mode": "lines", "line": {"color": style.colour, "width": 4}}
            if many:
                look = {
                    "mode": "lines+markers",
                    "line": {"color": style.colour, "width": 2, "dash": style.dash},
                    "marker": {"symbol": style.symbol, "size": 8},
                }
            chart.add_scatter(
                x=lines[0][1]["u"],
                y=scale * np.mean([line[metric] for _, line in lines], axis=0),
                name=method,
                legendgroup=method,
                hovertemplate="mean at u = %{x:.2f}: %{y:.4g}",
                **look,
            )
    return [Figure(title, caption, chart, wide=many)] if chart.data else []
