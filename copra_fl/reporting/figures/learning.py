"""Charts of learning by round, and of the CopRA schedule: the adapters that are on."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from copra_fl.config import Config, CopraConfig
from copra_fl.records import Evaluation, RoundRecord
from copra_fl.reporting.figures.canvas import by_round, legended, round_ticks, started
from copra_fl.reporting.html import HEIGHT, Figure, Style, colorbar, empty_chart
from copra_fl.reporting.results import Comparison, Run
from copra_fl.reporting.statistics import activity
from copra_fl.reporting.tables import REFERENCES
from copra_fl.wording import join_words

Evaluate = Callable[[RoundRecord], Evaluation | None]


def learning(comparison: Comparison) -> list[Figure]:
    """Return validation accuracy and loss of the global model by round; of several data sets also on each."""
    records = (record for _, run in comparison.runs for record in run.journal)
    datasets = dict.fromkeys(name for record in records if record.validation for name in record.validation.datasets)
    figures = _learning(comparison, lambda record: record.validation, "")
    for name in datasets:
        figures += _learning(comparison, _evaluation_on(name), f" on {name}")
    return figures


def _evaluation_on(dataset: str) -> Evaluate:
    return lambda record: record.validation.datasets.get(dataset) if record.validation else None


def _learning(comparison: Comparison, evaluate: Evaluate, dataset: str) -> list[Figure]:
    data = f"The global model on the server's validation data{dataset}."
    lines = {} if dataset else _references(comparison)
    named = f" Dotted lines: {join_words(lines)}." if lines else ""
    accuracy = by_round(
        comparison,
        lambda record: 100 * evaluation.accuracy if (evaluation := evaluate(record)) else None,
        f"Accuracy by round{dataset}",
        f"Higher is better. {data}{named}",
        {"title": "accuracy, %"},
    )
    for figure in accuracy:
        for name, value in lines.items():
            figure.chart.add_hline(
                y=100 * value, line={"color": "#52606d", "width": 1.5, "dash": "dot"}, annotation_text=name,
                annotation_position="top right", annotation_font={"size": 12, "color": "#52606d"},
            )  # fmt: skip
    macro_f1 = by_round(
        comparison,
        lambda record: _percent(evaluation.metrics.get("macro_f1")) if (evaluation := evaluate(record)) else None,
        f"Macro-F1 by round{dataset}",
        f"Higher is better. Mean F1 of the classes, all with equal weight, however many examples they have. {data}",
        {"title": "macro-F1, %"},
    )
    loss = by_round(
        comparison,
        lambda record: evaluation.loss if (evaluation := evaluate(record)) else None,
        f"Loss by round{dataset}",
        f"Lower is better. Cross-entropy in nats. {data}",
        {"title": "loss"},
    )
    return [*accuracy, *loss, *macro_f1]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _references(comparison: Comparison) -> dict[str, float]:
    """Return the validation accuracies that need no training by name, means over runs, as far as they are known."""
    majority, base = [], []
    for _, run in comparison.runs:
        last = next((record.validation for record in reversed(run.journal) if record.validation), None)
        if last and "majority" in last.metrics:
            majority.append(last.metrics["majority"])
        if run.summary and run.summary.base_validation:
            base.append(run.summary.base_validation.accuracy)
    known = {REFERENCES["majority"]: majority, REFERENCES["base_accuracy"]: base}
    return {name: float(np.mean(values)) for name, values in known.items() if values}


def schedule(comparison: Comparison) -> list[Figure]:
    """Return a chart of the probability p(t) that a layer is on, and of the share of layers that were on."""
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
            line={"color": style.color, "dash": style.dash},
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
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            customdata=list(shares),
            hovertemplate="round %{customdata}: %{y:.1f} % on",
        )
    chart.update_layout(legend={"entrywidth": 0})
    caption = (
        "Lines: the probability p(t) that a layer's adapter is on in a training step. Marks, in the middle of each "
        f"round: the share of adapters that were on, over all layers and clients; {comparison.named_seeds}."
    )
    return [Figure("Probability of being on", caption, chart)]


def activity_maps(comparison: Comparison) -> list[Figure]:
    """Return a heat map of activity by layer and round for each schedule that switched layers on and off."""
    figures = []
    for name, runs, style in _schedules(comparison):
        shares = activity(runs)
        if len(np.unique(list(shares.values()))) <= 1:
            continue
        layers = next(record.layers for run in runs for record in run.journal)
        prefix = os.path.commonprefix(list(layers))
        prefix = prefix[: prefix.rfind(".") + 1]
        chart = empty_chart({"title": "round", "dtick": round_ticks(comparison)}, {"title": f"{prefix}*"})
        chart.add_heatmap(
            x=list(shares),
            y=[layer.removeprefix(prefix) for layer in layers],
            z=100 * np.transpose(list(shares.values())),
            zmin=0,
            zmax=100,
            colorscale=[[0, "#ffffff"], [1, style.color]],
            colorbar=colorbar("% of steps"),
            texttemplate="%{z:.0f}" if len(shares) <= 8 else None,
            hovertemplate="layer %{y}, round %{x}: on in %{z:.1f} % of steps<extra></extra>",
        )
        chart.update_xaxes(showgrid=False, zeroline=False)
        chart.update_yaxes(type="category", showgrid=False)
        chart.update_layout(height=max(HEIGHT, 90 + 18 * len(layers)))
        caption = (
            "Percentage of the training steps in which each layer's adapter was on, mean over clients. A column of one "
            f"shade means that no layer was favored; {comparison.named_seeds}."
        )
        figures.append(Figure(f"Activity by layer with {name}", caption, chart))
    return figures


def _schedules(comparison: Comparison) -> list[tuple[str, list[Run], Style]]:
    """Return (name, runs, style) of each schedule; methods with equal schedules share one, as masks ignore the rule."""
    groups: dict[CopraConfig, list[tuple[str, list[Run], Style]]] = {}
    for method, runs, style in started(comparison):
        groups.setdefault(runs[0].config.copra, []).append((method, runs, style))
    merged = []
    for (first, runs, style), *others in groups.values():
        name = f"{first} and {len(others)} other{'s' if len(others) > 1 else ''}" if others else first
        merged.append((name, [*runs, *(run for _, more_runs, _ in others for run in more_runs)], style))
    return merged


def _corners(config: Config) -> tuple[list[float], list[float]]:
    """Return the points (rounds done, p) between which p(t) is a straight line."""
    num_rounds, copra = config.federation.num_rounds, config.copra
    if copra.local_training != "copra":
        p = {"lora": 1, "line": 1, "head": 0}[copra.local_training]
        return [0, num_rounds], [p, p]
    periods = [(0, num_rounds)] if copra.schedule_progress == "federation" else [(n, n + 1) for n in range(num_rounds)]
    x = [x for start, end in periods for x in (start, start + copra.ramp * (end - start), end)]
    return x, [copra.p0, copra.p1, copra.p1] * len(periods)
