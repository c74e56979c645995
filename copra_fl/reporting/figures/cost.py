"""Charts of communication and time, and of the accuracy reached with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from copra_fl.records import ComparisonSummary, Curve
from copra_fl.reporting.figures.canvas import add_band, are_many, by_method, legended, started, styles
from copra_fl.reporting.html import STYLES, Figure, Style, empty_chart
from copra_fl.reporting.results import Comparison

#: field of `Curve` -> its meaning, as a sentence
CAPTIONS = {
    "bytes_up": "Contents of all messages from the nodes to the server.",
    "bytes": "Contents of all messages in both directions; a node gets one copy for all its clients.",
    "flops": "Estimated operations of forward and backward passes; below the lowest layer that is on, none backward.",
}
#: axes of `accuracy_for_cost`: title of the figure, title of the axis, factor to its unit, field of `Curve`
COSTS = (
    ("MB up", "MB up, all clients", 1e-6, "bytes_up"),
    ("MB up and down", "MB up and down, all clients", 1e-6, "bytes"),
    ("operations", "TFLOPs of training, all clients", 1e-12, "flops"),
)
#: a larger ratio of the bytes is shown on a logarithmic axis
MAX_LINEAR_RATIO = 10


def accuracy_for_cost(summary: ComparisonSummary) -> list[Figure]:
    """Return validation accuracy against bytes and operations spent, if some method was evaluated more than once."""
    curves = {method: curve for method, curve in summary.curves.items() if len(curve.rounds) > 1}
    many = len(summary.methods) > len(STYLES)
    figures = []
    for cost, axis, scale, name in COSTS:
        chart = empty_chart({"title": axis, "rangemode": "tozero"}, {"title": "validation accuracy, %"})
        for method, style in styles(summary.methods).items():
            spent = getattr(curves[method], name) if method in curves else None
            if spent is not None:
                _add_curve(chart, method, style, curves[method], [scale * value for value in spent], band=not many)
        goals = {goal for of_method in summary.to_target.values() for goal in of_method.targets}
        if len(goals) == 1:
            chart.add_hline(y=100 * goals.pop(), line={"color": "#52606d", "width": 1, "dash": "dot"})
        band = "; band: lowest to highest seed" if len(summary.seeds) > 1 and not many else ""
        caption = (
            f"Up and to the left is better. Each mark is an evaluated round, mean over seeds{band}; up to the last "
            f"round that all seeds reached. {CAPTIONS[name]}"
        )
        if chart.data:
            figures.append(Figure(f"Accuracy against {cost}", caption, chart, wide=many))
    return figures


def _add_curve(chart: go.Figure, method: str, style: Style, curve: Curve, spent: Sequence[float], band: bool) -> None:
    if band and curve.lowest != curve.highest:
        edges = [*curve.highest, *curve.lowest[::-1]]
        add_band(chart, method, style, [*spent, *spent[::-1]], [100 * accuracy for accuracy in edges])
    chart.add_scatter(
        x=spent,
        y=[100 * accuracy for accuracy in curve.accuracy],
        name=method,
        legendgroup=method,
        mode="lines+markers",
        line={"color": style.color, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 7},
        customdata=curve.rounds,
        hovertemplate="round %{customdata}: %{y:.1f} % for %{x:.4g}",
    )


def accuracy_for_bytes(comparison: Comparison) -> list[Figure]:
    """Return test accuracy against the bytes sent in a whole run; the Pareto-optimal methods are labeled."""
    points, personal = {}, []
    for method in comparison.methods:
        summaries = [summary for _, summary in comparison.finished(method)]
        accuracies = [100 * summary.test.accuracy for summary in summaries if summary.test]
        if accuracies:
            megabytes = float(np.mean([1e-6 * (summary.bytes_up + summary.bytes_down) for summary in summaries]))
            points[method] = (megabytes, float(np.mean(accuracies)))
        elif summaries:
            personal.append(method)
    if len(points) < 3:  # the results table is enough
        return []
    chart = legended(comparison, {"title": "MB up and down"}, {"title": "test accuracy, %"})
    optimal: list[str] = []  # no other method is both cheaper and more accurate
    for method in sorted(points, key=lambda method: (points[method][0], -points[method][1])):
        if not optimal or points[method][1] > points[optimal[-1]][1]:
            optimal.append(method)
    chart.add_scatter(
        x=[points[method][0] for method in optimal],
        y=[points[method][1] for method in optimal],
        mode="lines",
        line={"color": "#9aa5b1", "shape": "hv", "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for method, _, style in started(comparison):
        if method in points:
            megabytes, accuracy = points[method]
            chart.add_scatter(
                x=[megabytes],
                y=[accuracy],
                name=method,
                mode="markers+text",
                text=[method if method in optimal else ""],
                textposition="top center",
                cliponaxis=False,
                marker={"symbol": style.symbol, "size": 11, "color": style.color},
                hovertemplate="%{y:.1f} % for %{x:.2f} MB",
            )
    traffic = [megabytes for megabytes, _ in points.values()]
    if max(traffic) > MAX_LINEAR_RATIO * min(traffic) > 0:
        chart.update_xaxes(type="log", dtick="D2")
    else:
        chart.update_xaxes(rangemode="tozero")
    caption = (
        f"Up and to the left is better. Each mark is a method after the last round, {comparison.mean_over_seeds}. "
        "The labeled methods are those for which no other is both cheaper and more accurate."
    )
    if personal:
        caption += f" Left out, because they have no global model to test: {', '.join(personal)}."
    return [Figure("Accuracy for bytes", caption, chart, wide=are_many(comparison))]


def traffic_and_time(comparison: Comparison) -> list[Figure]:
    """Return bytes and wall-clock time of whole runs."""
    bytes_chart, seconds_chart = by_method(comparison, {"title": "MB"}), by_method(comparison, {"title": "seconds"})
    for method, _, style in started(comparison):
        summaries = [summary for _, summary in comparison.finished(method)]
        if not summaries:
            continue
        bytes_up, bytes_down = [s.bytes_up for s in summaries], [s.bytes_down for s in summaries]
        for name, sizes, opacity in (("up", bytes_up, 1.0), ("down", bytes_down, 0.55)):
            megabytes = 1e-6 * np.mean(sizes)
            bytes_chart.add_bar(
                orientation="h",
                y=[method],
                x=[megabytes],
                name=name,
                marker={"color": style.color, "opacity": opacity},
                text=f"{name} {megabytes:.1f}",
                hovertemplate=f"{name} %{{x:.3f}} MB<extra>{method}</extra>",
            )
        seconds = [summary.seconds for summary in summaries]
        seconds_chart.add_box(
            orientation="h",
            y=[method] * len(seconds),
            x=seconds,
            name=method,
            boxpoints="all",
            pointpos=0,
            line={"color": style.color, "width": 1.5},
            marker={"symbol": style.symbol, "size": 9},
            customdata=[seed for seed, _ in comparison.finished(method)],
            hovertemplate="seed %{customdata}: %{x:.0f} s<extra></extra>",
        )
    bytes_chart.update_layout(barmode="stack")
    seconds_chart.update_xaxes(rangemode="tozero")
    sent = (
        "Bytes of the messages to the nodes (down: one copy for all clients of a node) and back (up: one update per "
        f"client) in a whole run; {comparison.mean_over_seeds}."
    )
    took = (
        "Wall-clock time of all rounds of a run: local training, messages, aggregation; without the server's "
        f"evaluation. Each mark is a run; {comparison.named_seeds}."
    )
    figures = [Figure("Bytes sent", sent, bytes_chart), Figure("Time", took, seconds_chart)]
    return [figure for figure in figures if figure.chart.data]
