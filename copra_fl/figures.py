"""The charts of a report. A method has one colour, symbol and dash in all of them.

Each public function turns a `Comparison` into a list of figures, empty where the runs did
not record what it shows.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from copra_fl.config import Config
from copra_fl.page import HEIGHT, STYLES, Figure, Style, empty_chart
from copra_fl.results import Comparison, Run, activity, join, metrics


def learning(comparison: Comparison) -> list[Figure]:
    """Validation accuracy and loss of the global model by round."""
    split = "The global model on the server's validation data."
    accuracy, loss = {"title": "accuracy, %"}, {"title": "loss"}
    return [
        *_by_round(comparison, "validation", "accuracy", "Accuracy by round", f"Higher is better. {split}", accuracy),
        *_by_round(comparison, "validation", "loss", "Loss by round", f"Lower is better. Cross-entropy. {split}", loss),
    ]


def merge_gaps(comparison: Comparison) -> list[Figure]:
    """What averaging gained over the clients it averaged, by round."""
    what = "of the averaged model minus the weighted mean of the clients' own, on the server's validation data."
    gained = f"Above 0, averaging helped: accuracy {what}"
    lost = f"Below 0, averaging helped: loss {what}"
    points, loss = ({"title": unit, "rangemode": "tozero"} for unit in ("points", "loss"))
    return [
        *_by_round(comparison, "merge_gap", "accuracy", "Merge gap in accuracy", gained, points),
        *_by_round(comparison, "merge_gap", "loss", "Merge gap in loss", lost, loss),
    ]


def connectivity(comparison: Comparison) -> list[Figure]:
    """Loss and accuracy along the straight lines between pairs of clients."""
    what = (
        "Thin lines: pairs of clients after the last round, from the adapter and head of one (u = 0) to those of the "
        "other (u = 1), A and B interpolated apart (factor path). Thick: their mean. "
        f"Server's validation data, {comparison.named_seeds}."
    )
    return [
        *_along_lines(comparison, "loss", "Loss on the line", f"A bump is a barrier. {what}", "loss"),
        *_along_lines(comparison, "accuracy", "Accuracy on the line", f"A dip is a barrier. {what}", "accuracy, %"),
    ]


def schedule(comparison: Comparison) -> list[Figure]:
    """p(t), and the share of layers that really was on."""
    chart = empty_chart(
        {"title": "rounds done", "dtick": _round_ticks(comparison)}, {"title": "layers on, %", "range": [-4, 104]}
    )
    for method, runs, style in _methods(comparison):
        x, p = _schedule_corners(runs[0].config)
        chart.add_scatter(
            x=x,
            y=100 * np.array(p),
            name=method,
            legendgroup=method,
            mode="lines",
            line={"color": style.colour, "dash": style.dash},
            hovertemplate="p = %{y:.0f} % after %{x:.2f} rounds",
        )
        shares = activity(runs)
        chart.add_scatter(
            x=[number - 0.5 for number in shares],
            y=[100 * np.mean(share) for share in shares.values()],
            name=method,
            legendgroup=method,
            showlegend=False,
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 9},
            customdata=list(shares),
            hovertemplate="round %{customdata}: %{y:.1f} % on",
        )
    caption = (
        "Lines: the probability p(t) that a layer's adapter is on in a step. Marks, in the middle of each round: "
        f"the share that really was on, over all layers and clients. Training, {comparison.named_seeds}."
    )
    return [Figure("Probability of being on", caption, chart)]


def activity_maps(comparison: Comparison) -> list[Figure]:
    """Realised activity, layer by round, of each method that ever switched a layer off."""
    figures = []
    for method, runs, style in _methods(comparison):
        shares = activity(runs)
        if all(np.all(share == 1) for share in shares.values()):
            continue
        layers = next(row["layers"] for run in runs for row in run.journal)
        prefix = os.path.commonprefix(layers)
        prefix = prefix[: prefix.rfind(".") + 1]
        chart = empty_chart({"title": "round", "dtick": _round_ticks(comparison)}, {"title": f"{prefix}*"})
        chart.add_heatmap(
            x=list(shares),
            y=[layer.removeprefix(prefix) for layer in layers],
            z=100 * np.transpose(list(shares.values())),
            zmin=0,
            zmax=100,
            colorscale=[[0, "#ffffff"], [1, style.colour]],
            colorbar={"title": {"text": "% of steps", "side": "right"}, "thickness": 12},
            texttemplate="%{z:.0f}" if len(shares) <= 8 else None,
            hovertemplate="layer %{y}, round %{x}: on in %{z:.1f} % of steps<extra></extra>",
        )
        chart.update_xaxes(showgrid=False, zeroline=False)
        chart.update_yaxes(type="category", showgrid=False)
        chart.update_layout(height=max(HEIGHT, 90 + 18 * len(layers)))
        caption = (
            "Percent of the steps in which each layer's adapter was on, averaged over clients. A column in one "
            f"shade favours no layer. Training, {comparison.named_seeds}."
        )
        figures.append(Figure(f"Activity by layer with {method}", caption, chart))
    return figures


def client_accuracy(comparison: Comparison) -> list[Figure]:
    """The final global model on each client's own validation data."""
    chart = empty_chart({"title": "seed", "type": "category"}, {"title": "accuracy, %"})
    for method, _, style in _methods(comparison):
        clients = [(seed, client) for seed, end in comparison.finished(method) for client in end["clients"]]
        if clients:
            chart.add_box(
                x=[str(seed) for seed, _ in clients],
                y=[100 * client["accuracy"] for _, client in clients],
                name=method,
                boxpoints="all",
                pointpos=0,
                jitter=0.5,
                line={"color": style.colour, "width": 1.5},
                marker={"symbol": style.symbol, "size": 7, "opacity": 0.7},
                customdata=[[client["client"], client["examples"]] for _, client in clients],
                hovertemplate="client %{customdata[0]}: %{y:.1f} % of %{customdata[1]} examples",
            )
    chart.update_layout(boxmode="group")
    caption = (
        "Does the average serve every client? A mark is a client: the final global model on its own validation data. "
        "The box is the middle half of the clients."
    )
    return [Figure("Accuracy per client", caption, chart)] if chart.data else []


def client_examples(comparison: Comparison) -> list[Figure]:
    """How uneven the split is; read from the first method's runs, as runs of one seed share their split."""
    method, runs, _ = next(_methods(comparison))
    chart = empty_chart({"title": "clients, largest first"}, {"title": "examples"})
    for run, grey in zip(runs, itertools.cycle(("#444444", "#8c8c8c", "#c4c4c4")), strict=False):
        examples = {client["client"]: client["examples"] for row in run.journal for client in row["clients"]}
        clients = sorted(examples, key=lambda client: -examples[client])
        chart.add_bar(
            x=list(range(1, len(clients) + 1)),
            y=[examples[client] for client in clients],
            name=f"seed {run.seed}",
            marker={"color": grey},
            customdata=clients,
            hovertemplate="client %{customdata}: %{y} examples",
        )
    caption = f"How uneven the split is: training examples of each client that took part, in the runs of {method}."
    return [Figure("Examples per client", caption, chart)]


def cost(comparison: Comparison) -> list[Figure]:
    """Bytes and wall-clock time of whole runs."""
    bytes_chart = empty_chart({"title": "MB"}, {"autorange": "reversed"})
    seconds_chart = empty_chart({"title": "seconds", "rangemode": "tozero"}, {"autorange": "reversed"})
    for method, _, style in _methods(comparison):
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
    for chart in (bytes_chart, seconds_chart):
        chart.update_layout(barmode="stack", showlegend=False, height=120 + 60 * len(comparison.methods))
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


def _methods(comparison: Comparison) -> Iterator[tuple[str, list[Run], Style]]:
    """The methods with at least one started run."""
    for (method, runs), style in zip(comparison.methods.items(), itertools.cycle(STYLES), strict=False):
        if runs:
            yield method, runs, style


def _recorded(run: Run, key: str) -> list[dict[str, Any]]:
    """The journal rows that have `key`: not every round is evaluated."""
    return [row for row in run.journal if row.get(key)]


def _by_round(
    comparison: Comparison, key: str, metric: str, title: str, caption: str, y_axis: dict[str, Any]
) -> list[Figure]:
    """The journal's ``row[key][metric]``: a line a method with a band over seeds."""
    chart = empty_chart({"title": "round", "dtick": _round_ticks(comparison)}, y_axis)
    scale = 100 if metric == "accuracy" else 1
    for method, runs, style in _methods(comparison):
        by_round: dict[int, list[float]] = {}
        for row in itertools.chain.from_iterable(_recorded(run, key) for run in runs):
            by_round.setdefault(row["round"], []).append(scale * row[key][metric])
        rounds = sorted(by_round)
        if len(runs) > 1:
            chart.add_scatter(
                x=rounds + rounds[::-1],
                y=[max(by_round[n]) for n in rounds] + [min(by_round[n]) for n in rounds[::-1]],
                fill="toself",
                mode="none",
                fillcolor=style.colour,
                opacity=0.18,
                hoverinfo="skip",
                showlegend=False,
                legendgroup=method,
            )
        if rounds:
            chart.add_scatter(
                x=rounds,
                y=[np.mean(by_round[n]) for n in rounds],
                name=method,
                legendgroup=method,
                mode="lines+markers",
                line={"color": style.colour},
                marker={"symbol": style.symbol, "size": 9},
                hovertemplate="round %{x}: %{y:.4g}",
            )
    spread = "Line: mean; band: lowest to highest of " if len(comparison.seeds) > 1 else ""
    return [Figure(title, f"{caption} {spread}{comparison.named_seeds}.", chart)] if chart.data else []


def _along_lines(comparison: Comparison, metric: str, title: str, caption: str, unit: str) -> list[Figure]:
    chart = empty_chart({"title": "u"}, {"title": unit})
    scale = 100 if metric == "accuracy" else 1
    for method, _, style in _methods(comparison):
        lines = [(seed, line) for seed, end in comparison.finished(method) for line in end["paths"]]
        for seed, line in lines:
            chart.add_scatter(
                x=line["u"],
                y=scale * np.array(line[metric]),
                name=method,
                legendgroup=method,
                showlegend=False,
                mode="lines",
                line={"color": style.colour, "width": 1},
                opacity=0.5,
                hovertemplate=f"seed {seed}, clients {join(line['clients'])}: %{{y:.4g}}",
            )
        if lines:
            chart.add_scatter(
                x=lines[0][1]["u"],
                y=scale * np.mean([line[metric] for _, line in lines], axis=0),
                name=method,
                legendgroup=method,
                mode="lines",
                line={"color": style.colour, "width": 4},
                hovertemplate="mean at u = %{x:.2f}: %{y:.4g}",
            )
    return [Figure(title, caption, chart)] if chart.data else []


def _schedule_corners(config: Config) -> tuple[list[float], list[float]]:
    """p(t) is straight between these points; x is in rounds done."""
    num_rounds, copra = config.federation.num_rounds, config.copra
    if copra.local_training == "lora":
        return [0, num_rounds], [1, 1]
    periods = [(0, num_rounds)] if copra.progress == "federation" else [(n, n + 1) for n in range(num_rounds)]
    x = [x for start, end in periods for x in (start, start + copra.ramp * (end - start), end)]
    return x, [copra.p0, 1, 1] * len(periods)


def _round_ticks(comparison: Comparison) -> int:
    """Whole rounds between ticks, so that there are at most eight or so."""
    return math.ceil(max(run.config.federation.num_rounds for _, run in comparison.runs) / 8)
