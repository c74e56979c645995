"""The charts of a benchmark's page, made from its stored facts; a chart without data is left out.

Each caption ends with the machine, since the numbers depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go

from copra_fl.bench.findings import FLAT, RATES, RATIOS, RIVALS, BenchFacts, has_targets, machine, ratio
from copra_fl.bench.sizes import TRAININGS
from copra_fl.bench.steps import expected_blocks
from copra_fl.reporting.html import STYLES, Figure, Style, empty_chart

#: training -> its name on the page, and its style
LABELS = {"lora": ("LoRA", STYLES[0]), "copra": ("CopRA", STYLES[1])}
TARGET = {"symbol": "line-ns-open", "size": 22, "color": "#1f2933", "line": {"width": 3}}


def speed(facts: BenchFacts, name: str) -> list[Figure]:
    """Return the chart of clients per second of each competitor."""
    competitors = facts["sizes"][name]["competitors"]
    chart = _bars({"title": "clients / s"}, competitors)
    for training in TRAININGS:
        values = [competitor["trainings"][training]["clients_per_second"] for competitor in competitors.values()]
        _add_bars(chart, training, _names(competitors), values)
    repeats = facts["repeats"]
    bars = f"medians; whiskers: minimum and maximum of {repeats} repeats" if repeats > 1 else "one run, no repeats"
    caption = f"More is better. Bars: {bars}."
    return [_figure(facts, "Clients per second", caption, chart)]


def ratios(facts: BenchFacts, name: str) -> list[Figure]:
    """Return charts of clients per second relative to each rival, with targets."""
    judged = has_targets(name, facts["sizes"][name])
    competitors, figures = facts["sizes"][name]["competitors"], []
    for rival in RIVALS:
        ours = {letter: competitor for letter, competitor in competitors.items() if letter in "defg"}
        if rival not in competitors or not ours:
            continue
        chart = _bars({"title": "times as fast"}, ours)
        names = _names(ours)
        for training in TRAININGS:
            values = [[ratio(competitors, letter, rival, training)] for letter in ours]
            _add_bars(chart, training, names, values, "{:.2f}")
        factors = {letter: _factors(name, letter, rival, "e" not in competitors) for letter in ours if judged}
        for training in TRAININGS:
            targets = {names[letter]: by_training[training] for letter, by_training in factors.items() if by_training}
            _add_targets(chart, training, targets)
        chart.add_vline(x=1, line={"color": "#52606d", "width": 1})
        rival_name = f"({rival}) {competitors[rival]['name']}"
        caption = f"Median clients per second, divided by that of {rival_name} in the same run."
        if judged:
            caption += " Vertical strokes: targets."
        figures.append(_figure(facts, f"Relative to {rival_name}", caption, chart))
    return figures


def matmul_share(facts: BenchFacts, name: str) -> list[Figure]:
    """Return the chart of operations per second, relative to large matrix products."""
    competitors = facts["sizes"][name]["competitors"]
    chart = _bars({"title": "% of the matmul rate"}, competitors)
    names = _names(competitors)
    for training in TRAININGS:
        values = [
            [100 * share for share in competitor["trainings"][training]["share_of_matmul_rate"]]
            for competitor in competitors.values()
        ]
        _add_bars(chart, training, names, values, "{:.0f} %")
    if name == "compute" and has_targets(name, facts["sizes"][name]):
        _add_targets(chart, "lora", {names[letter]: 100 * share for letter, share in RATES if letter in names})
    caption = (
        "Floating point operations of the training, relative to large matrix products in the same time, with the same "
        "dtype and split of the cores."
    )
    return [_figure(facts, "Share of the matmul rate", caption, chart)]


def memory(facts: BenchFacts, name: str) -> list[Figure]:
    """Return the chart of the peak memory of all processes of a competitor, for each split of the cores."""
    competitors = facts["sizes"][name]["competitors"]
    chart = _bars({"title": "MB"}, competitors)
    splits = dict.fromkeys(split for competitor in competitors.values() for split in competitor["peak_memory"])
    for split, style in zip(splits, STYLES[2:], strict=False):
        measured = {
            letter: competitor for letter, competitor in competitors.items() if split in competitor["peak_memory"]
        }
        megabytes = [1e-6 * competitor["peak_memory"][split] for competitor in measured.values()]
        _add_bar(chart, split, style, list(_names(measured).values()), megabytes, [f"{peak:.0f}" for peak in megabytes])
    caption = "Peak of all processes together (proportional set size), by workers x threads. Less is better."
    return [_figure(facts, "Memory", caption, chart)]


def scaling(facts: BenchFacts, name: str) -> list[Figure]:
    """Return charts of the cost per client and of memory over the number of clients."""
    measured = facts["sizes"][name].get("scaling")
    if not measured:
        return []
    counts = [int(clients) for clients in measured["seconds_per_client"]]
    milliseconds = [[1e3 * second for second in seconds] for seconds in measured["seconds_per_client"].values()]
    axis = {"title": "clients", "type": "log", "tickvals": counts, "ticktext": list(map(str, counts))}
    cost = empty_chart(axis, {"title": "ms per client and round", "rangemode": "tozero"})
    lowest = min(map(median, milliseconds))
    cost.add_hrect(y0=lowest, y1=lowest * (1 + FLAT), fillcolor="#8c8c8c", opacity=0.2, line={"width": 0})
    _add_line(cost, "cost per client", STYLES[0], counts, milliseconds)
    peaks = empty_chart(axis, {"title": "MB", "rangemode": "tozero"})
    _add_line(peaks, "peak memory", STYLES[2], counts, [[1e-6 * peak] for peak in measured["peak_memory"].values()])
    for chart in (cost, peaks):
        chart.update_layout(showlegend=False)
    cost_caption = (
        "copra-fl engine in process: time of a round per client; medians with minimum and maximum. "
        f"Target: within the band of {FLAT:.0%} above the lowest median."
    )
    extra_kb, adapter_kb = (measured[key] / 1e3 for key in ("memory_per_extra_client", "adapter_bytes"))
    memory_caption = (
        f"copra-fl engine in process. Between the two largest numbers of clients, each additional client takes "
        f"{extra_kb:.0f} kB; its adapter has {adapter_kb:.0f} kB."
    )
    return [
        _figure(facts, "Cost per client", cost_caption, cost),
        _figure(facts, "Memory by number of clients", memory_caption, peaks),
    ]


def schedule(facts: BenchFacts, name: str) -> list[Figure]:
    """Return the chart of the share of a LoRA step that CopRA saves: closed form, counted, measured."""
    savings = facts["sizes"][name].get("schedule")
    if not savings:
        return []
    points, ramp = savings["points"], savings["ramp"]
    chart = empty_chart({"title": "progress t of the training"}, {"title": "% of a LoRA step saved"})
    t = [ramp * step / 50 for step in range(51)]
    curve = [100 * savings["block_share"] * expected_blocks(time / ramp, savings["layers"]) for time in t]
    chart.add_scatter(x=[*t, 1], y=[*curve, 0], name="closed form", mode="lines", line={"color": STYLES[0].color})
    counted = [[100 * share for share in point["counted"]] for point in points]
    measured = [[100 * share for share in point["measured"]] for point in points]
    times = [point["t"] for point in points]
    chart.add_scatter(
        x=times,
        y=[sum(shares) / len(shares) for shares in counted],
        name="counted, for the drawn masks",
        mode="markers",
        marker={"symbol": "diamond-open", "size": 11, "color": STYLES[2].color},
        hovertemplate="%{y:.1f} % counted",
    )
    chart.add_scatter(
        x=times,
        y=[median(shares) for shares in measured],
        error_y=_whiskers(measured),
        name="measured",
        mode="markers",
        marker={"symbol": STYLES[1].symbol, "size": 9, "color": STYLES[1].color},
        hovertemplate="%{y:.1f} % measured",
    )
    caption = (
        f"Share of a LoRA step that a CopRA step saves; p rises to 1 at t = {ramp:g}. Over the whole schedule: "
        f"{savings['expected']:.1%} in closed form, {median(savings['measured']):.1%} measured. copra-fl engine in "
        f"process, {savings['core_split']}; medians with minimum and maximum of {len(savings['measured'])} passes."
    )
    return [_figure(facts, "Savings of CopRA over the schedule", caption, chart)]


def _figure(facts: BenchFacts, title: str, caption: str, chart: go.Figure) -> Figure:
    return Figure(title, f"{caption} {machine(facts)}.", chart)


def _names(competitors: Mapping[str, BenchFacts]) -> dict[str, str]:
    """Return the label of each competitor's bars, by letter."""
    return {
        letter: f"({letter}) {competitor['name']}".replace(", ", ",<br>") for letter, competitor in competitors.items()
    }


def _bars(x_axis: dict[str, Any], competitors: Mapping[str, BenchFacts]) -> go.Figure:
    """Return a chart for horizontal bars, with the first competitor at the top."""
    axis = {"type": "category", "autorange": "reversed", "ticklabelstandoff": 6}
    chart = empty_chart(x_axis | {"rangemode": "tozero"}, axis)
    chart.update_layout(barmode="group", scattermode="group", height=110 + 60 * len(competitors))
    return chart


def _add_bars(
    chart: go.Figure,
    training: str,
    names: Mapping[str, str],
    values: Sequence[Sequence[float]],
    number: str = "{:.3g}",
) -> None:
    """Add a bar for each list of `values`: its median, with whiskers if it has several values."""
    label, style = LABELS[training]
    medians = list(map(median, values))
    _add_bar(chart, label, style, list(names.values()), medians, [number.format(length) for length in medians])
    if any(len(repeats) > 1 for repeats in values):
        chart.data[-1].error_x = _whiskers(values)


def _add_bar(
    chart: go.Figure, label: str, style: Style, names: Sequence[str], lengths: Sequence[float], texts: Sequence[str]
) -> None:
    chart.add_bar(
        orientation="h",
        y=names,
        x=lengths,
        name=label,
        offsetgroup=label,
        marker={"color": style.color},
        text=texts,
        textangle=0,
        insidetextanchor="start",
        hovertemplate="%{text}",
    )


def _add_targets(chart: go.Figure, training: str, targets: Mapping[str, float]) -> None:
    """Add a stroke across the bar of `training` for each competitor with a target."""
    label, _ = LABELS[training]
    if targets:
        chart.add_scatter(
            x=list(targets.values()),
            y=list(targets),
            name=f"target, {label}",
            offsetgroup=label,
            orientation="h",
            mode="markers",
            marker=TARGET,
            showlegend=False,
            hovertemplate="target %{x:g}",
        )


def _add_line(chart: go.Figure, name: str, style: Style, x: Sequence[int], values: Sequence[Sequence[float]]) -> None:
    chart.add_scatter(
        x=x,
        y=list(map(median, values)),
        error_y=_whiskers(values),
        name=name,
        mode="lines+markers",
        line={"color": style.color},
        marker={"symbol": style.symbol, "size": 9},
        hovertemplate="%{x} clients: %{y:.3g}",
    )


def _whiskers(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return error bars from the minimum to the maximum of each list, around its median."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(repeats) - median(repeats) for repeats in values],
        "arrayminus": [median(repeats) - min(repeats) for repeats in values],
        "thickness": 1.5,
        "color": "#1f2933",
    }


def _factors(name: str, letter: str, rival: str, engine_for_cohorts: bool) -> dict[str, float]:
    """Return the target of each training's ratio; empty if `letter` has no target against `rival`."""
    target_letter = "e" if letter == "g" and engine_for_cohorts else letter
    for size, letter_with_target, target_rival, *factors in RATIOS:
        if (size, letter_with_target, target_rival) == (name, target_letter, rival):
            return dict(zip(TRAININGS, factors, strict=True))
    return {}
