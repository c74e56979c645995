"""What a study found, cell by cell: gains with intervals, the rates they were reached at, and what goes with a gain.

The figures take the contents of a grid's ``results.json`` (`reporting.study.write`), so that they can be made again
from stored results, for a page or for a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import Figure, empty_chart

Results = Mapping[str, Any]
Cell = Mapping[str, Any]


def label(cell: Cell) -> str:
    """The cell's name in charts and tables."""
    return f"{cell['regime']}, {cell['split']}"


def gains(results: Results) -> list[Figure]:
    """Test accuracy of every method minus the baseline's: a point and a 95 % interval a cell."""
    baseline = results["cells"][0]["baseline"]
    caption = (
        f"Above 0: better than {baseline}. Differences in points, paired by seed, with 95 % t-intervals; an interval "
        f"that covers 0 says that the two cannot be told apart. {_data(results)}"
    )
    chart = _by_cell(results, f"points above {baseline}", lambda cell, method: cell["differences"].get(method))
    chart.add_hline(y=0, line={"color": "#1f2933", "width": 1})
    return [Figure(f"Test accuracy against {baseline}", caption, chart, wide=True)]


def accuracies(results: Results) -> list[Figure]:
    """Test accuracy of every method in every cell."""
    caption = f"Global model after the last round, mean over seeds with 95 % t-intervals. {_data(results)}"
    chart = _by_cell(results, "test accuracy, %", lambda cell, method: cell["methods"].get(method))
    return [Figure("Test accuracy", caption, chart, wide=True)]


def rates(results: Results) -> list[Figure]:
    """Validation accuracy against learning rate: how each method's rate was chosen, a chart a cell."""
    figures = []
    for cell in results["cells"]:
        chart = empty_chart({"title": "learning rate", "type": "log"}, {"title": "validation accuracy, %"})
        for method, style in styles(cell["methods"]).items():
            tried = cell["rates"][method]["validation_accuracy"]
            chart.add_scatter(
                x=[float(rate) for rate in tried],
                y=[100 * accuracy for accuracy in tried.values()],
                name=method,
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash},
                marker={"symbol": style.symbol, "size": 9},
            )
        ticks = sorted({float(rate) for found in cell["rates"].values() for rate in found["validation_accuracy"]})
        chart.update_xaxes(tickvals=ticks, ticktext=[f"{rate:g}" for rate in ticks])
        caption = (
            f"The highest point of a line is the method's rate. Mean over the tuning seeds {cell['tuning_seeds']}."
        )
        figures.append(Figure(f"Learning rates: {label(cell)}", caption, chart))
    return figures


#: what may go with a gain: metric of `results.metrics`, its name, and the factor to the unit shown
PREDICTORS = (
    ("merge_gap_accuracy", "merge gap, points", 100.0),
    ("barrier_entezari", "barrier (Entezari), loss", 1.0),
    ("aggregation_error", "aggregation error, points", 100.0),
)


def predictors(results: Results) -> list[Figure]:
    """Whether what is measured of averaging goes with a gain: a point a cell, method and seed."""
    figures = []
    for metric, name, scale in PREDICTORS:
        found = gains_against(results, metric)
        if not found or (correlation := pearson(found)) is None:
            continue
        chart = empty_chart({"title": f"{name}: minus the baseline's"}, {"title": "test accuracy: points above it"})
        for method, style in styles(found).items():
            x, y = np.array(found[method]).T
            chart.add_scatter(
                x=scale * x,
                y=100 * y,
                name=method,
                mode="markers",
                marker={"color": style.colour, "symbol": style.symbol, "size": 8, "opacity": 0.7},
            )
        number = sum(map(len, found.values()))
        caption = f"A mark is a seed in a cell. Pearson correlation {correlation:+.2f} over {number}. {_data(results)}"
        figures.append(Figure(f"Does the {name.partition(',')[0]} go with a gain?", caption, chart))
    return figures


def gains_against(results: Results, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Method -> (`metric`, test accuracy) of each seed in each cell, both minus the baseline's.

    Without methods that train the head alone: they have no adapters to average.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in results["cells"]:
        training = cell["settings"]["differing"].get("local-training", {})
        for method, found in cell["differences"].items():
            pairs = zip(found[metric]["values"], found["test_accuracy"]["values"], strict=True)
            known = [(one, gain) for one, gain in pairs if one is not None and gain is not None]
            if known and training.get(method) != "head":
                points.setdefault(method, []).extend(known)
    return points


def pearson(points: Mapping[str, Sequence[tuple[float, float]]]) -> float | None:
    """The correlation over all points together; None where there is no spread to correlate."""
    x, y = np.array([point for found in points.values() for point in found]).T
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else None


def _by_cell(results: Results, title: str, found: Callable[[Cell, str], Mapping[str, Any] | None]) -> go.Figure:
    """A chart with the cells side by side, and in each a point with its interval a method."""
    cells: Sequence[Cell] = results["cells"]
    methods = list(dict.fromkeys(method for cell in cells for method in cell["methods"]))
    chart = empty_chart(
        {
            "tickvals": list(range(len(cells))),
            "ticktext": [label(cell) for cell in cells],
            "showgrid": False,
            "zeroline": False,
            "range": [-0.5, len(cells) - 0.5],
        },
        {"title": title},
    )
    for place, (method, style) in enumerate(styles(methods).items()):
        shift = 0.6 * ((place + 0.5) / len(methods) - 0.5)
        points = [(i, each["test_accuracy"]) for i, cell in enumerate(cells) if (each := found(cell, method))]
        points = [(i, each) for i, each in points if each["mean"] is not None]
        if not points:
            continue
        means = [100 * each["mean"] for _, each in points]
        chart.add_scatter(
            x=[i + shift for i, _ in points],
            y=means,
            name=method,
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 11},
            error_y={
                "array": [100 * (each["interval"] or [0, each["mean"]])[1] - mean
                          for (_, each), mean in zip(points, means, strict=True)],
                "thickness": 2,
                "width": 5,
            },
            hovertemplate="%{y:.1f}",
        )  # fmt: skip
    return chart


def _data(results: Results) -> str:
    """Model and data, as a sentence."""
    settings = results["cells"][0]["settings"]["common"]
    return f"{settings['model']} on {settings['dataset']}; names of cells: rounds x local steps, split."
