"""What there is to see of single clients."""

from __future__ import annotations

import itertools

from copra_fl.reporting.figures.canvas import are_many, by_method, started
from copra_fl.reporting.html import HEIGHT, Figure, empty_chart
from copra_fl.reporting.results import Comparison


def client_accuracy(comparison: Comparison) -> list[Figure]:
    """The final model on each client's own validation data."""
    chart = by_method(comparison, {"title": "accuracy, %"})
    for method, _, style in started(comparison):
        clients = [(seed, client) for seed, end in comparison.finished(method) for client in end["clients"]]
        if clients:
            chart.add_box(
                orientation="h",
                x=[100 * client["accuracy"] for _, client in clients],
                y=[method] * len(clients),
                name=method,
                boxpoints="all",
                pointpos=0,
                jitter=0.5,
                line={"color": style.colour, "width": 1.5},
                marker={"symbol": style.symbol, "size": 7, "opacity": 0.7},
                customdata=[[client["client"], seed, client["examples"]] for seed, client in clients],
                hovertemplate="client %{customdata[0]}, seed %{customdata[1]}: %{x:.1f} % of %{customdata[2]} examples",
            )
    caption = (
        "Does the average serve every client? A mark is a client: the final global model on its own validation data "
        "(with personal models: its own). The box is the middle half of the clients; "
        f"{comparison.named_seeds}."
    )
    chart.update_layout(height=max(HEIGHT, chart.layout.height))
    return [Figure("Accuracy per client", caption, chart, wide=are_many(comparison))] if chart.data else []


def client_examples(comparison: Comparison) -> list[Figure]:
    """How uneven the split is; read from the first method's runs, as runs of one seed share their split."""
    method, runs, _ = next(started(comparison))
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
