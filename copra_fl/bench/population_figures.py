"""The chart of size ``clients``: seconds of each phase by number of clients."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from copra_fl.bench.findings import BenchFacts, machine
from copra_fl.bench.population import PER_ROUND, SHARE, seconds
from copra_fl.reporting.html import STYLES, Figure, empty_chart


def figures(facts: BenchFacts) -> list[Figure]:
    """Return the chart of seconds by number of clients; empty without this size."""
    populations: BenchFacts = facts.get("clients", {})
    if not populations:
        return []
    counts = sorted(map(int, populations))
    axis = {"title": "clients", "type": "log", "tickvals": counts, "ticktext": [f"{clients:,}" for clients in counts]}
    chart = empty_chart(axis, {"title": "CPU seconds", "type": "log"})
    for style, phase in zip(STYLES, _longest(populations[str(counts[-1])]), strict=False):
        chart.add_scatter(
            x=counts,
            y=[seconds(populations[str(clients)], phase) for clients in counts],
            name=f"{phase} ({'round' if phase in PER_ROUND else 'run'})",
            mode="lines+markers",
            line={"color": style.color, "dash": "solid" if phase in PER_ROUND else "dot"},
            marker={"symbol": style.symbol, "size": 9},
            hovertemplate="%{y:.3g} s",
        )
    _add_proportional(chart, counts, min(seconds(populations[str(counts[0])], phase) for phase in PER_ROUND))
    caption = (
        f"CPU seconds of the phases that take longest, by number of clients; {SHARE:.0%} of them train in a round. "
        "Solid: in each round; dotted: once in a run. The gray line grows as the number of clients. "
        f"{machine(facts)}."
    )
    return [Figure("Seconds by number of clients", caption, chart)]


def _longest(largest: BenchFacts) -> list[str]:
    """Return the phases of a round, and those of a run that take longest, one for each style."""
    of_run = sorted((p for p in largest["seconds"] if p not in PER_ROUND), key=lambda p: -seconds(largest, p))
    return [
        phase for phase in largest["seconds"] if phase in PER_ROUND or phase in of_run[: len(STYLES) - len(PER_ROUND)]
    ]


def _add_proportional(chart: go.Figure, counts: Sequence[int], start: float) -> None:
    chart.add_scatter(
        x=list(counts),
        y=[start * clients / counts[0] for clients in counts],
        name="as the number of clients",
        mode="lines",
        line={"color": "#9aa5b1", "width": 1},
        hoverinfo="skip",
    )
