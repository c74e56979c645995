"""What all charts have in common: a method has one colour, symbol and dash in all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from copra_fl.reporting.html import HEIGHT, STYLES, Figure, Style, empty_chart
from copra_fl.reporting.results import Comparison, Run

#: with more methods than there are styles: the first 7 have the first symbol, the next 7 the second ...
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross")


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style for each method. With many of them a rule has a colour and a symbol; with CopRA it is dotted and open."""
    methods = list(methods)
    if len(methods) <= len(STYLES):
        return dict(zip(methods, STYLES, strict=False))
    plain = {method: "lora" if method == "copra" else method.removesuffix("+copra") for method in methods}
    looks = itertools.cycle(Style(style.colour, symbol, "solid") for symbol in SYMBOLS for style in STYLES)
    look = dict(zip(dict.fromkeys(plain.values()), looks, strict=False))
    return {
        method: look[name] if method == name else replace(look[name], symbol=f"{look[name].symbol}-open", dash="dot")
        for method, name in plain.items()
    }


def are_many(comparison: Comparison) -> bool:
    """Whether there are so many methods that charts take the whole width and leave out bands and single lines."""
    return len(comparison.methods) > len(STYLES)


def started(comparison: Comparison) -> Iterator[tuple[str, list[Run], Style]]:
    """The methods with at least one started run."""
    looks = styles(comparison.methods)
    return ((method, runs, looks[method]) for method, runs in comparison.methods.items() if runs)


def legended(comparison: Comparison, x_axis: dict[str, Any], y_axis: dict[str, Any]) -> go.Figure:
    """A blank chart with room for a legend of all methods."""
    chart = empty_chart(x_axis, y_axis)
    if are_many(comparison):
        chart.update_layout(
            height=HEIGHT + 100 + 5 * len(comparison.methods),
            legend={"entrywidth": 130, "font": {"size": 12}},
        )
    return chart


def by_method(comparison: Comparison, x_axis: dict[str, Any]) -> go.Figure:
    """A blank chart with a row a method, the first on top."""
    chart = empty_chart(x_axis, {"autorange": "reversed", "type": "category"})
    chart.update_layout(showlegend=False, height=120 + (24 if are_many(comparison) else 60) * len(comparison.methods))
    return chart


def round_ticks(comparison: Comparison) -> int:
    """Whole rounds between ticks, so that there are at most eight or so."""
    return math.ceil(max(run.config.federation.num_rounds for _, run in comparison.runs) / 8)


def by_round(
    comparison: Comparison,
    value: Callable[[dict[str, Any]], float | None],
    title: str,
    caption: str,
    y_axis: dict[str, Any],
) -> list[Figure]:
    """A number of the journal's rows, where they have it: a line a method with a band over seeds."""
    chart = legended(comparison, {"title": "round", "dtick": round_ticks(comparison)}, y_axis)
    many = are_many(comparison)
    for method, runs, style in started(comparison):
        values: dict[int, list[float]] = {}
        for row in itertools.chain.from_iterable(run.journal for run in runs):
            if (found := value(row)) is not None:
                values.setdefault(row["round"], []).append(found)
        rounds = sorted(values)
        if len(runs) > 1 and not many:
            chart.add_scatter(
                x=rounds + rounds[::-1],
                y=[max(values[n]) for n in rounds] + [min(values[n]) for n in rounds[::-1]],
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
                y=[float(np.mean(values[n])) for n in rounds],
                name=method,
                legendgroup=method,
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash} if many else {"color": style.colour},
                marker={"symbol": style.symbol, "size": 9},
                hovertemplate="round %{x}: %{y:.4g}",
            )
    band = "" if many else "; band: lowest to highest"
    spread = f"Line: mean{band} of " if len(comparison.seeds) > 1 else ""
    return [Figure(title, f"{caption} {spread}{comparison.named_seeds}.", chart, wide=many)] if chart.data else []
