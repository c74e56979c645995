"""Shared parts of all charts: a method has the same color, symbol and dash in each chart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go

from copra_fl.records import RoundRecord
from copra_fl.reporting.html import HEIGHT, STYLES, Figure, Style, empty_chart
from copra_fl.reporting.results import Comparison, Run

#: used if there are more methods than styles: the first 7 methods have the first symbol, the next 7 the second ...
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross")


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Return a style for each method. With many methods each rule has one, dotted and with open symbols for CopRA."""
    methods = list(methods)
    if len(methods) <= len(STYLES):
        return dict(zip(methods, STYLES, strict=False))
    rules = {method: "lora" if method == "copra" else method.removesuffix("+copra") for method in methods}
    rule_styles = itertools.cycle(Style(style.color, symbol, "solid") for symbol in SYMBOLS for style in STYLES)
    by_rule = dict(zip(dict.fromkeys(rules.values()), rule_styles, strict=False))
    return {method: by_rule[rule] if method == rule else _with_copra(by_rule[rule]) for method, rule in rules.items()}


def _with_copra(style: Style) -> Style:
    return replace(style, symbol=f"{style.symbol}-open", dash="dot")


def are_many(comparison: Comparison) -> bool:
    """Return True if there are so many methods that charts take the whole width and show means only."""
    return len(comparison.methods) > len(STYLES)


def started(comparison: Comparison) -> Iterator[tuple[str, list[Run], Style]]:
    """Return (method, runs, style) of each method with at least one started run."""
    by_method = styles(comparison.methods)
    return ((method, runs, by_method[method]) for method, runs in comparison.methods.items() if runs)


def legended(comparison: Comparison, x_axis: Mapping[str, object], y_axis: Mapping[str, object]) -> go.Figure:
    """Return an empty chart with room for a legend of all methods."""
    chart = empty_chart(x_axis, y_axis)
    if are_many(comparison):
        chart.update_layout(
            height=HEIGHT + 100 + 5 * len(comparison.methods),
            legend={"entrywidth": 130, "font": {"size": 12}},
        )
    return chart


def by_method(comparison: Comparison, x_axis: Mapping[str, object]) -> go.Figure:
    """Return an empty chart with one row per method, the first on top."""
    chart = empty_chart(x_axis, {"autorange": "reversed", "type": "category"})
    chart.update_layout(showlegend=False, height=120 + (24 if are_many(comparison) else 60) * len(comparison.methods))
    return chart


def round_ticks(comparison: Comparison) -> int:
    """Return the number of rounds between ticks, so that there are about eight ticks at most."""
    return math.ceil(max(run.config.federation.num_rounds for _, run in comparison.runs) / 8)


def add_band(chart: go.Figure, method: str, style: Style, x: Sequence[float], y: Sequence[float]) -> None:
    """Add the area inside the closed line `x`, `y` in the color of `method`; it hides and shows with the method."""
    chart.add_scatter(
        x=x,
        y=y,
        fill="toself",
        mode="none",
        fillcolor=style.color,
        opacity=0.18,
        hoverinfo="skip",
        showlegend=False,
        legendgroup=method,
    )


def by_round(
    comparison: Comparison,
    value: Callable[[RoundRecord], float | None],
    title: str,
    caption: str,
    y_axis: Mapping[str, object],
) -> list[Figure]:
    """Return a chart of `value` by round, where it is not None: one line per method, with a band over seeds.

    A line ends with the first of the method's finished runs: later rounds would be the mean of fewer seeds.
    """
    chart = legended(comparison, {"title": "round", "dtick": round_ticks(comparison)}, y_axis)
    many = are_many(comparison)
    for method, runs, style in started(comparison):
        by_run = [{record.round: value(record) for record in run.journal} for run in runs]
        finished = [of_run for of_run, run in zip(by_run, runs, strict=True) if run.summary]
        values: dict[int, list[float]] = {}
        for number, measured in itertools.chain.from_iterable(of_run.items() for of_run in by_run):
            if measured is not None and all(of_run.get(number) is not None for of_run in finished):
                values.setdefault(number, []).append(measured)
        rounds = sorted(values)
        if not rounds:
            continue
        if len(runs) > 1 and not many:
            edges = [max(values[n]) for n in rounds] + [min(values[n]) for n in rounds[::-1]]
            add_band(chart, method, style, rounds + rounds[::-1], edges)
        chart.add_scatter(
            x=rounds,
            y=[float(np.mean(values[n])) for n in rounds],
            name=method,
            legendgroup=method,
            mode="lines+markers",
            line={"color": style.color, "dash": style.dash} if many else {"color": style.color},
            marker={"symbol": style.symbol, "size": 9},
            hovertemplate="round %{x}: %{y:.4g}",
        )
    seeds = comparison.mean_over_seeds.capitalize()
    if len(comparison.seeds) > 1 and not many:
        seeds += "; band: lowest to highest seed"
    return [Figure(title, f"{caption} {seeds}.", chart, wide=many)] if chart.data else []
