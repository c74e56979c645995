"""What runs cost, and what they give for it."""

from __future__ import annotations

import numpy as np

from copra_fl.reporting.figures.canvas import are_many, by_method, legended, started
from copra_fl.reporting.html import Figure
from copra_fl.reporting.results import Comparison
from copra_fl.reporting.statistics import metrics

#: traffics that are further apart than this factor are shown on a logarithmic axis
FAR_APART = 10


def accuracy_for_bytes(comparison: Comparison) -> list[Figure]:
    """Test accuracy against bytes, both ways and in a whole run; the methods that none beats in both are named."""
    points, without = {}, []
    for method in comparison.methods:
        ends = [metrics(end) for _, end in comparison.finished(method)]
        accuracies = [100 * end["test_accuracy"] for end in ends if end["test_accuracy"] is not None]
        if accuracies:
            points[method] = (float(np.mean([1e-6 * (end["bytes"] or 0) for end in ends])), float(np.mean(accuracies)))
        elif ends:
            without.append(method)
    if len(points) < 3:  # which the results say as well
        return []
    chart = legended(comparison, {"title": "MB up and down"}, {"title": "test accuracy, %"})
    best: list[str] = []  # no other is both cheaper and better
    for method in sorted(points, key=lambda method: (points[method][0], -points[method][1])):
        if not best or points[method][1] > points[best[-1]][1]:
            best.append(method)
    chart.add_scatter(
        x=[points[method][0] for method in best],
        y=[points[method][1] for method in best],
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
                text=[method if method in best else ""],
                textposition="top center",
                marker={"symbol": style.symbol, "size": 11, "color": style.colour},
                hovertemplate="%{y:.1f} % for %{x:.2f} MB",
            )
    traffic = [megabytes for megabytes, _ in points.values()]
    if max(traffic) > FAR_APART * min(traffic) > 0:
        chart.update_xaxes(type="log", dtick="D2")
    else:
        chart.update_xaxes(rangemode="tozero")
    caption = (
        "Up and to the left is better. A mark is a method, after the last round, mean of "
        f"{comparison.named_seeds}; named are those that no other beats in both."
    )
    if without:
        caption += f" Not here, since there is no global model to test: {', '.join(without)}."
    return [Figure("Accuracy for bytes", caption, chart, wide=are_many(comparison))]


def traffic_and_time(comparison: Comparison) -> list[Figure]:
    """Bytes and wall-clock time of whole runs."""
    bytes_chart, seconds_chart = by_method(comparison, {"title": "MB"}), by_method(comparison, {"title": "seconds"})
    for method, _, style in started(comparison):
        ends = [metrics(end) for _, end in comparison.finished(method)]
        if not ends:
            continue
        for name, opacity in (("up", 1.0), ("down", 0.55)):
            megabytes = np.mean([1e-6 * (end[f"bytes_{name}"] or 0) for end in ends])
            bytes_chart.add_bar(
                orientation="h",
                y=[method],
                x=[megabytes],
                name=name,
                marker={"color": style.colour, "opacity": opacity},
                text=f"{name} {megabytes:.1f}",
                hovertemplate=f"{name} %{{x:.3f}} MB<extra>{method}</extra>",
            )
        seconds = [end["seconds"] for end in ends]
        seconds_chart.add_box(
            orientation="h",
            y=[method] * len(seconds),
            x=seconds,
            name=method,
            boxpoints="all",
            pointpos=0,
            line={"color": style.colour, "width": 1.5},
            marker={"symbol": style.symbol, "size": 9},
            customdata=[seed for seed, _ in comparison.finished(method)],
            hovertemplate="seed %{customdata}: %{x:.0f} s<extra></extra>",
        )
    bytes_chart.update_layout(barmode="stack")
    seconds_chart.update_xaxes(rangemode="tozero")
    sent = (
        "Tensors sent to the nodes (down: one copy for all clients of a node) and back (up: each client's) "
        f"in a whole run; mean of {comparison.named_seeds}."
    )
    took = (
        "Wall-clock time of a run's rounds: local training, messages, averaging; the server's evaluation is not "
        f"counted. A mark is a run; {comparison.named_seeds}."
    )
    figures = [Figure("Bytes sent", sent, bytes_chart), Figure("Time", took, seconds_chart)]
    return [figure for figure in figures if figure.chart.data]
