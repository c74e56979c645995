"""The charts of a benchmark's page, from its stored facts; empty lists where a run did not measure what they show.

Each caption ends with the machine, without which no number means anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go

from copra_fl.bench.findings import FLAT, RATES, RATIOS, Facts, has_targets, machine, ratio
from copra_fl.bench.sizes import TRAININGS
from copra_fl.bench.steps import expected_blocks
from copra_fl.reporting.html import STYLES, Figure, Style, empty_chart

#: what a training is called on the page, and its style
LABELS = {"lora": ("LoRA", STYLES[0]), "copra": ("CopRA", STYLES[1])}
TARGET = {"symbol": "line-ns-open", "size": 22, "color": "#1f2933", "line": {"width": 3}}


def speed(facts: Facts, name: str) -> list[Figure]:
    """Clients per second of each contestant."""
    contestants = facts["sizes"][name]["contestants"]
    chart = _bars({"title": "clients / s"}, contestants)
    for training in TRAININGS:
        values = {letter: each["trainings"][training]["clients_per_second"] for letter, each in contestants.items()}
        _add_bars(chart, training, _names(contestants), values.values())
    repeats = facts["repeats"]
    bars = f"medians; whiskers: lowest and highest of {repeats} repeats" if repeats > 1 else "one run, no repeats"
    caption = f"More is better. Bars: {bars}."
    return [_figure(facts, "Clients per second", caption, chart)]


def ratios(facts: Facts, name: str) -> list[Figure]:
    """Clients per second by those of Flower with warm actors and of the PEFT loop, with the targets."""
    judged = has_targets(name, facts["sizes"][name])
    contestants, found = facts["sizes"][name]["contestants"], []
    for rival in "bc":
        ours = {letter: each for letter, each in contestants.items() if letter in "defg"}
        if rival not in contestants or not ours:
            continue
        chart = _bars({"title": "times as fast"}, ours)
        names = _names(ours)
        for training in TRAININGS:
            values = [[ratio(contestants, letter, rival, training)] for letter in ours]
            _add_bars(chart, training, names, values, "{:.2f}")
        wanted = {letter: _factors(name, letter, rival, "e" not in contestants) for letter in ours if judged}
        for training in TRAININGS:
            _add_targets(chart, training, {names[letter]: of[training] for letter, of in wanted.items() if of})
        chart.add_vline(x=1, line={"color": "#52606d", "width": 1})
        caption = (
            f"Medians of clients per second by those of ({rival}), {contestants[rival]['name']}, in the same run."
            + (" Upright strokes: targets." if judged else "")
        )
        found.append(_figure(facts, f"Against ({rival}) {contestants[rival]['name']}", caption, chart))
    return found


def matmul_share(facts: Facts, name: str) -> list[Figure]:
    """Operations per second by what large matrix products reach."""
    contestants = facts["sizes"][name]["contestants"]
    chart = _bars({"title": "% of the matmul rate"}, contestants)
    names = _names(contestants)
    for training in TRAININGS:
        values = [
            [100 * share for share in each["trainings"][training]["share_of_matmul_rate"]]
            for each in contestants.values()
        ]
        _add_bars(chart, training, names, values, "{:.0f} %")
    if name == "compute" and has_targets(name, facts["sizes"][name]):
        _add_targets(chart, "lora", {names[letter]: 100 * least for letter, least in RATES if letter in names})
    caption = (
        "Floating point operations that the training needs, by what large matrix products do in the same time, dtype "
        "and division of the cores."
    )
    return [_figure(facts, "Share of the matmul rate", caption, chart)]


def memory(facts: Facts, name: str) -> list[Figure]:
    """Peak memory of all processes of a contestant, in each division of the cores."""
    contestants = facts["sizes"][name]["contestants"]
    chart = _bars({"title": "MB"}, contestants)
    divisions = dict.fromkeys(division for each in contestants.values() for division in each["peak_memory"])
    for division, style in zip(divisions, STYLES[2:], strict=False):
        there = {letter: each for letter, each in contestants.items() if division in each["peak_memory"]}
        megabytes = [1e-6 * each["peak_memory"][division] for each in there.values()]
        _add_bar(chart, division, style, list(_names(there).values()), megabytes, [f"{peak:.0f}" for peak in megabytes])
    caption = "Peak of all processes together (proportional set size), by workers x threads. Less is better."
    return [_figure(facts, "Memory", caption, chart)]


def scaling(facts: Facts, name: str) -> list[Figure]:
    """Cost of a client and memory against the number of clients."""
    found = facts["sizes"][name].get("scaling")
    if not found:
        return []
    counts = [int(clients) for clients in found["seconds_per_client"]]
    milliseconds = [[1e3 * second for second in seconds] for seconds in found["seconds_per_client"].values()]
    axis = {"title": "clients", "type": "log", "tickvals": counts, "ticktext": list(map(str, counts))}
    cost = empty_chart(axis, {"title": "ms a client and round", "rangemode": "tozero"})
    least = min(map(median, milliseconds))
    cost.add_hrect(y0=least, y1=least * (1 + FLAT), fillcolor="#8c8c8c", opacity=0.2, line={"width": 0})
    _add_line(cost, "cost of a client", STYLES[0], counts, milliseconds)
    peaks = empty_chart(axis, {"title": "MB", "rangemode": "tozero"})
    _add_line(peaks, "peak memory", STYLES[2], counts, [[1e-6 * peak] for peak in found["peak_memory"].values()])
    for chart in (cost, peaks):
        chart.update_layout(showlegend=False)
    took = (
        "Our engine in process: seconds of a round by the number of its clients, medians with lowest and highest. Flat "
        f"would be inside the band of {FLAT:.0%} above the lowest."
    )
    weighs = (
        f"Our engine in process. Between the two largest numbers of clients one more takes "
        f"{found['memory_per_extra_client'] / 1e3:.0f} kB; its adapter has {found['adapter_bytes'] / 1e3:.0f} kB."
    )
    return [
        _figure(facts, "Cost of a client with more clients", took, cost),
        _figure(facts, "Memory with more clients", weighs, peaks),
    ]


def schedule(facts: Facts, name: str) -> list[Figure]:
    """Share of a LoRA step that CopRA saves: closed form, counted, measured."""
    found = facts["sizes"][name].get("schedule")
    if not found:
        return []
    points, ramp = found["points"], found["ramp"]
    chart = empty_chart({"title": "progress t of the training"}, {"title": "% of a LoRA step saved"})
    t = [ramp * step / 50 for step in range(51)]
    curve = [100 * found["block_share"] * expected_blocks(time / ramp, found["layers"]) for time in t]
    chart.add_scatter(x=[*t, 1], y=[*curve, 0], name="closed form", mode="lines", line={"color": STYLES[0].color})
    counted = [[100 * share for share in point["counted"]] for point in points]
    measured = [[100 * share for share in point["measured"]] for point in points]
    times = [point["t"] for point in points]
    chart.add_scatter(
        x=times,
        y=[sum(shares) / len(shares) for shares in counted],
        name="counted, of the masks drawn",
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
        f"How much cheaper a CopRA step is than a LoRA step; p rises to 1 at t = {ramp:g}. Over the whole schedule "
        f"{found['expected']:.1%} in closed form, {median(found['measured']):.1%} measured. Our engine in process, "
        f"{found['division']}; medians with lowest and highest of {len(found['measured'])} passes."
    )
    return [_figure(facts, "CopRA against LoRA over the schedule", caption, chart)]


def _figure(facts: Facts, title: str, caption: str, chart: go.Figure) -> Figure:
    return Figure(title, f"{caption} {machine(facts)}.", chart)


def _names(contestants: Mapping[str, Facts]) -> dict[str, str]:
    """Letter -> what stands beside its bars."""
    return {letter: f"({letter}) {each['name']}".replace(", ", ",<br>") for letter, each in contestants.items()}


def _bars(x_axis: dict[str, Any], contestants: Mapping[str, Facts]) -> go.Figure:
    """A chart for horizontal bars, the first contestant at the top."""
    axis = {"type": "category", "autorange": "reversed", "ticklabelstandoff": 6}
    chart = empty_chart(x_axis | {"rangemode": "tozero"}, axis)
    chart.update_layout(barmode="group", scattermode="group", height=110 + 60 * len(contestants))
    return chart


def _add_bars(chart: go.Figure, training: str, names: Mapping[str, str], values: Any, number: str = "{:.3g}") -> None:
    """A bar for each list of `values`: its median, with whiskers where there are several."""
    label, style = LABELS[training]
    values = list(values)
    medians = [median(each) for each in values]
    _add_bar(chart, label, style, list(names.values()), medians, map(number.format, medians))
    if any(len(each) > 1 for each in values):
        chart.data[-1].error_x = _whiskers(values)


def _add_bar(
    chart: go.Figure, label: str, style: Style, names: Sequence[str], lengths: Sequence[float], texts: Any
) -> None:
    chart.add_bar(
        orientation="h",
        y=names,
        x=lengths,
        name=label,
        offsetgroup=label,
        marker={"color": style.color},
        text=list(texts),
        textangle=0,
        insidetextanchor="start",
        hovertemplate="%{text}",
    )


def _add_targets(chart: go.Figure, training: str, targets: Mapping[str, float]) -> None:
    """A stroke across the bar of `training` of each contestant that has a target."""
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
        y=[median(each) for each in values],
        error_y=_whiskers(values),
        name=name,
        mode="lines+markers",
        line={"color": style.color},
        marker={"symbol": style.symbol, "size": 9},
        hovertemplate="%{x} clients: %{y:.3g}",
    )


def _whiskers(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """From the lowest to the highest of each, about its median."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(each) - median(each) for each in values],
        "arrayminus": [median(each) - min(each) for each in values],
        "thickness": 1.5,
        "color": "#1f2933",
    }


def _factors(name: str, letter: str, rival: str, engine_for_cohorts: bool) -> dict[str, float]:
    """Training -> the ratio to reach; empty where `letter` has no target against `rival`."""
    wanted = "e" if letter == "g" and engine_for_cohorts else letter
    for size, ours, other, *factors in RATIOS:
        if (size, ours, other) == (name, wanted, rival):
            return dict(zip(TRAININGS, factors, strict=True))
    return {}
