"""How the global model learns, and when adapters are on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from copra_fl.config import Config, CopraConfig
from copra_fl.reporting.figures.canvas import by_round, legended, round_ticks, started
from copra_fl.reporting.html import HEIGHT, Figure, Style, empty_chart
from copra_fl.reporting.results import Comparison, Run
from copra_fl.reporting.statistics import activity

#: a journal's row -> the evaluation in it that is shown
Evaluation = Callable[[dict[str, Any]], dict[str, float] | None]


def learning(comparison: Comparison) -> list[Figure]:
    """Validation accuracy and loss of the global model by round; with several data sets also on each of these."""
    rows = (row for _, run in comparison.runs for row in run.journal)
    datasets = dict.fromkeys(name for row in rows for name in _by_dataset(row))
    figures = _learning(comparison, lambda row: row.get("validation"), "")
    for name in datasets:
        figures += _learning(comparison, _evaluation_on(name), f" on {name}")
    return figures


def _by_dataset(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    return (row.get("validation") or {}).get("datasets", {})


def _evaluation_on(dataset: str) -> Evaluation:
    return lambda row: _by_dataset(row).get(dataset)


def _learning(comparison: Comparison, evaluation: Evaluation, where: str) -> list[Figure]:
    split = f"The global model on the server's validation data{where}."
    return [
        *by_round(
            comparison,
            lambda row: 100 * found["accuracy"] if (found := evaluation(row)) else None,
            f"Accuracy by round{where}",
            f"Higher is better. {split}",
            {"title": "accuracy, %"},
        ),
        *by_round(
            comparison,
            lambda row: found["loss"] if (found := evaluation(row)) else None,
            f"Loss by round{where}",
            f"Lower is better. Cross-entropy. {split}",
            {"title": "loss"},
        ),
    ]


def schedule(comparison: Comparison) -> list[Figure]:
    """p(t), and the share of layers that really was on."""
    chart = legended(
        comparison,
        {"title": "rounds done", "dtick": round_ticks(comparison)},
        {"title": "layers on, %", "range": [-4, 104]},
    )
    chart.update_layout(height=HEIGHT)
    for name, runs, style in _schedules(comparison):
        x, p = _corners(runs[0].config)
        chart.add_scatter(
            x=x,
            y=100 * np.array(p),
            name=name,
            legendgroup=name,
            mode="lines",
            line={"color": style.colour, "dash": style.dash},
            hovertemplate="p = %{y:.0f} % after %{x:.2f} rounds",
        )
        shares = activity(runs)
        chart.add_scatter(
            x=[number - 0.5 for number in shares],
            y=[100 * np.mean(share) for share in shares.values()],
            name=name,
            legendgroup=name,
            showlegend=False,
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 9},
            customdata=list(shares),
            hovertemplate="round %{customdata}: %{y:.1f} % on",
        )
    chart.update_layout(legend={"entrywidth": 0})
    caption = (
        "Lines: the probability p(t) that a layer's adapter is on in a step. Marks, in the middle of each round: "
        f"the share that really was on, over all layers and clients. Training, {comparison.named_seeds}."
    )
    return [Figure("Probability of being on", caption, chart)]


def activity_maps(comparison: Comparison) -> list[Figure]:
    """Realised activity, layer by round, of each schedule that ever switched a layer off and on."""
    figures = []
    for name, runs, style in _schedules(comparison):
        shares = activity(runs)
        if len(np.unique(list(shares.values()))) == 1:
            continue
        layers = next(row["layers"] for run in runs for row in run.journal)
        prefix = os.path.commonprefix(layers)
        prefix = prefix[: prefix.rfind(".") + 1]
        chart = empty_chart({"title": "round", "dtick": round_ticks(comparison)}, {"title": f"{prefix}*"})
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
        figures.append(Figure(f"Activity by layer with {name}", caption, chart))
    return figures


def _schedules(comparison: Comparison) -> list[tuple[str, list[Run], Style]]:
    """Methods with the same schedule as one: masks do not depend on the rule."""
    groups: dict[CopraConfig, list[tuple[str, list[Run], Style]]] = {}
    for found in started(comparison):
        groups.setdefault(found[1][0].config.copra, []).append(found)
    merged = []
    for (first, runs, style), *others in groups.values():
        name = f"{first} and {len(others)} other{'s' if len(others) > 1 else ''}" if others else first
        merged.append((name, [*runs, *(run for _, more, _ in others for run in more)], style))
    return merged


def _corners(config: Config) -> tuple[list[float], list[float]]:
    """p(t) is straight between these points; x is in rounds done."""
    num_rounds, copra = config.federation.num_rounds, config.copra
    if copra.local_training != "copra":
        p = {"lora": 1, "head": 0}[copra.local_training]
        return [0, num_rounds], [p, p]
    periods = [(0, num_rounds)] if copra.schedule_progress == "federation" else [(n, n + 1) for n in range(num_rounds)]
    x = [x for start, end in periods for x in (start, start + copra.ramp * (end - start), end)]
    return x, [copra.p0, copra.p1, copra.p1] * len(periods)
