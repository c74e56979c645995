"""Charts of the effects of averaging: aggregation error, merge gap, loss and accuracy between two clients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from copra_fl.adapters.state import by_number
from copra_fl.records import LinePath
from copra_fl.reporting.figures.canvas import are_many, by_method, by_round, legended, started
from copra_fl.reporting.figures.lines import add_lines
from copra_fl.reporting.html import Figure, colorbar
from copra_fl.reporting.results import Comparison
from copra_fl.reporting.tables import barrier_note, merge_gap_note
from copra_fl.wording import join_words

#: in percent; a smaller error is float32 rounding, and the rule is exact
ROUNDING = 1e-4
#: a larger ratio of the errors is shown on a logarithmic axis
MAX_LINEAR_RATIO = 30


def aggregation_error(comparison: Comparison) -> list[Figure]:
    """Return the relative error of the new global product against the average of the clients' products, by round."""
    caption = (
        "Relative error of the new global adapter's product B A against the weighted average of the clients' products, "
        "over all layers. A lower error is closer to what the clients trained, which is not always a better model. "
        f"Exact: below {ROUNDING:g} %, the rounding of float32."
    )
    figures = by_round(
        comparison,
        lambda record: 100 * record.aggregation_error.total if record.aggregation_error else None,
        "Aggregation error by round",
        caption,
        {"title": "error, %", "rangemode": "tozero"},
    )
    for figure in figures:
        _make_logarithmic(figure.chart)
    return figures


def _make_logarithmic(chart: go.Figure) -> None:
    """Use a logarithmic axis if errors are far apart or mere rounding; rounding is drawn at the tick "exact"."""
    values = [value for trace in chart.data for value in trace.y]
    low, high = min(values), max(values)
    if ROUNDING < high <= MAX_LINEAR_RATIO * low:
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
    """Return a heat map of the aggregation error of the last round: one row per method, one column per module."""
    by_method_name = {}
    for method, runs, _ in started(comparison):
        errors = [run.journal[-1].aggregation_error for run in runs if run.journal]
        layers = [error.layers for error in errors if error]
        if layers:
            by_method_name[method] = {
                name: 100 * float(np.mean([errors_of_run[name] for errors_of_run in layers])) for name in layers[0]
            }
    if not by_method_name:
        return []
    modules = sorted(next(iter(by_method_name.values())), key=by_number)
    cells = [[errors_of_method.get(module) for module in modules] for errors_of_method in by_method_name.values()]
    chart = by_method(comparison, {"title": "layer"})
    chart.add_heatmap(
        x=_short(modules),
        y=list(by_method_name),
        z=cells,
        customdata=[modules] * len(by_method_name),
        zmin=0,
        zmax=max(1.0, *(error for row in cells for error in row if error is not None)),
        colorscale=[[0, "#ffffff"], [1, "#0072B2"]],
        colorbar=colorbar("error, %"),
        texttemplate="%{z:.0f}" if len(modules) <= 24 else None,
        textfont={"size": 11},
        hovertemplate="%{y}, %{customdata}: %{z:.3g} %<extra></extra>",
    )
    chart.update_xaxes(type="category", showgrid=False)
    chart.update_yaxes(showgrid=False)
    chart.update_layout(height=chart.layout.height + 100, margin={"t": 10})
    caption = (
        "Relative error of averaging in each adapted module; white: no error. After the last round, "
        f"{comparison.mean_over_seeds}."
    )
    return [Figure("Aggregation error by layer", caption, chart, wide=are_many(comparison))]


def _short(modules: list[str]) -> list[str]:
    """Shorten module names by the parts that all share: ``encoder.layer.0.attention.self.query`` to ``0.query``."""
    common = set.intersection(*(set(module.split(".")) for module in modules))
    return [".".join(part for part in module.split(".") if part not in common) or module for module in modules]


def merge_gaps(comparison: Comparison) -> list[Figure]:
    """Return the metrics of the averaged model minus the mean of those of the clients' models, by round."""
    settings = next(run.config for _, run in comparison.runs).to_flat()
    definition = (
        "of the averaged model minus the clients' weighted mean, on the server's validation data."
        f"{merge_gap_note(settings)}"
    )
    return [
        *by_round(
            comparison,
            lambda record: 100 * record.merge_gap.accuracy if record.merge_gap else None,
            "Merge gap in accuracy",
            f"Above 0, averaging helped: accuracy {definition}",
            {"title": "points", "rangemode": "tozero"},
        ),
        *by_round(
            comparison,
            lambda record: record.merge_gap.loss if record.merge_gap else None,
            "Merge gap in loss",
            f"Below 0, averaging helped: loss {definition}",
            {"title": "loss", "rangemode": "tozero"},
        ),
    ]


def connectivity(comparison: Comparison) -> list[Figure]:
    """Return loss and accuracy along the straight lines between pairs of clients."""
    lines = "Means over pairs of clients." if are_many(comparison) else "Thin: pairs of clients; thick: their mean."
    setting = (
        "From adapter and head of one client (u = 0) to those of the other (u = 1), A and B interpolated separately "
        f"(factor path). After the last round, on the server's validation data, {comparison.named_seeds}."
        f"{barrier_note(next(run.config for _, run in comparison.runs).to_flat())}"
    )
    return [
        *_along_lines(comparison, "loss", f"A bump is a barrier. {lines} {setting}"),
        *_along_lines(comparison, "accuracy", f"A dip is a barrier. {lines} {setting}"),
    ]


def _along_lines(comparison: Comparison, metric: str, caption: str) -> list[Figure]:
    chart = legended(comparison, {"title": "u"}, {"title": "accuracy, %" if metric == "accuracy" else "loss"})
    many = are_many(comparison)
    for method, _, style in started(comparison):
        paths = {
            f"seed {seed}, clients {join_words(path.clients)}": path
            for seed, summary in comparison.finished(method)
            for path in summary.paths
        }
        if paths:
            u = next(iter(paths.values())).u
            curves = {label: _values(path, metric) for label, path in paths.items()}
            add_lines(chart, method, style, u, curves, mean_only=many)
    return [Figure(f"{metric.capitalize()} on the line", caption, chart, wide=many)] if chart.data else []


def _values(path: LinePath, metric: str) -> Sequence[float]:
    return [100 * accuracy for accuracy in path.accuracy] if metric == "accuracy" else path.loss
