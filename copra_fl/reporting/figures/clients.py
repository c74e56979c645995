"""Charts of per-client results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from copra_fl.reporting.figures.canvas import are_many, by_method, started
from copra_fl.reporting.html import HEIGHT, Figure, empty_chart
from copra_fl.reporting.results import Comparison

Item = TypeVar("Item")

#: largest number of clients that a chart shows one by one; a page would grow with the number of clients
MAX_SHOWN = 1000
MANY = f" Of more than {MAX_SHOWN:,} clients so many are shown, evenly spaced from the lowest to the highest value."


def evenly_spaced(items: Sequence[Item]) -> Sequence[Item]:
    """Return at most `MAX_SHOWN` of the sorted `items`, with the first and the last, at equal distances."""
    if len(items) <= MAX_SHOWN:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, MAX_SHOWN).round().astype(int)]


def client_accuracy(comparison: Comparison) -> list[Figure]:
    """Return the accuracy of the final model on each client's own validation data."""
    chart = by_method(comparison, {"title": "accuracy, %"})
    for method, _, style in started(comparison):
        clients = [(seed, client) for seed, summary in comparison.finished(method) for client in summary.clients]
        if clients:
            shown = evenly_spaced(sorted(clients, key=lambda pair: pair[1].accuracy))
            chart.add_box(
                orientation="h",
                x=[100 * client.accuracy for _, client in shown],
                y=[method] * len(shown),
                name=method,
                boxpoints="all",
                pointpos=0,
                jitter=0.5,
                line={"color": style.color, "width": 1.5},
                marker={"symbol": style.symbol, "size": 7, "opacity": 0.7},
                customdata=[[client.client, seed, client.examples] for seed, client in shown],
                hovertemplate="client %{customdata[0]}, seed %{customdata[1]}: %{x:.1f} % of %{customdata[2]} examples",
            )
    caption = (
        "Each mark is a client: accuracy of the final global model, or with a personal rule of the client's own model, "
        "on the client's validation data. The box covers the middle half of the clients; "
        f"{comparison.named_seeds}.{MANY}"
    )
    chart.update_layout(height=max(HEIGHT, chart.layout.height))
    return [Figure("Accuracy per client", caption, chart, wide=are_many(comparison))] if chart.data else []


def client_examples(comparison: Comparison) -> list[Figure]:
    """Return the clients' numbers of training examples in the first method's runs; all methods share their splits."""
    method, runs, _ = next(started(comparison))
    chart = empty_chart({"title": "clients, largest first"}, {"title": "examples"})
    for run, gray in zip(runs, itertools.cycle(("#444444", "#8c8c8c", "#c4c4c4")), strict=False):
        examples = {client.client: client.examples for record in run.journal for client in record.clients}
        clients = sorted(examples, key=lambda client: -examples[client])
        shown = evenly_spaced(list(enumerate(clients, start=1)))
        chart.add_bar(
            x=[rank for rank, _ in shown],
            y=[examples[client] for _, client in shown],
            name=f"seed {run.seed}",
            marker={"color": gray},
            customdata=[client for _, client in shown],
            hovertemplate="client %{customdata}: %{y} examples",
        )
    caption = f"Training examples of each client that took part: the size of the split's parts. Runs of {method}.{MANY}"
    return [Figure("Examples per client", caption, chart)]
