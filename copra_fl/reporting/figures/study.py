"""Charts of a study: gains with intervals by cell, tuning of learning rates, and predictors of a gain.

They take the contents of a grid's ``results.json`` (`reporting.study.write`), so that they can be drawn again from
stored results, for a page or a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from copra_fl.records import CellResults, MetricEstimates, StudyResults
from copra_fl.reporting.data_table import with_minus
from copra_fl.reporting.figures.canvas import styles
from copra_fl.reporting.html import Figure, Style, empty_chart
from copra_fl.reporting.results import without_folders
from copra_fl.wording import join_words

#: metrics of `statistics.metrics` that may predict a gain: metric, name, and factor to the unit shown
PREDICTORS = (
    ("merge_gap_accuracy", "merge gap, points", 100.0),
    ("barrier_entezari", "barrier (Entezari), loss", 1.0),
    ("aggregation_error", "aggregation error, points", 100.0),
    ("aggregation_error_of_change", "aggregation error of the change, points", 100.0),
)
#: differences below this are the rounding of the metrics
ROUNDING = 1e-9


def label(cell: CellResults) -> str:
    """Return the name of `cell` in charts and tables."""
    return f"{cell.regime}, {cell.split}"


def gains(results: StudyResults) -> list[Figure]:
    """Return test accuracy of every method minus the baseline's: a point with a 95 % interval per cell."""
    baseline = results.cells[0].baseline
    caption = (
        f"Above 0: better than {baseline}. Differences in points, paired by seed, with 95 % t-intervals; an interval "
        f"that includes 0 is no significant difference. {_data(results)}"
    )
    chart = _by_cell(results, f"points above {baseline}", lambda cell: cell.differences)
    chart.add_hline(y=0, line={"color": "#1f2933", "width": 1})
    return [Figure(f"Test accuracy against {baseline}", caption, chart, wide=True)]


def accuracies(results: StudyResults) -> list[Figure]:
    """Return test accuracy of every method in every cell."""
    caption = f"Global model after the last round, mean over seeds with 95 % t-intervals. {_data(results)}"
    chart = _by_cell(results, "test accuracy, %", lambda cell: cell.methods)
    return [Figure("Test accuracy", caption, chart, wide=True)]


def rates(results: StudyResults) -> list[Figure]:
    """Return validation accuracy by learning rate, from which each method's rate was chosen: one chart per cell."""
    figures, by_method = [], _styles(results)
    for cell in results.cells:
        chart = empty_chart({"title": "learning rate", "type": "log"}, {"title": "validation accuracy, %"})
        for method, choice in cell.rates.items():
            style, accuracies_by_rate = by_method[method], choice.validation_accuracy
            chart.add_scatter(
                x=[float(rate) for rate in accuracies_by_rate],
                y=[100 * accuracy for accuracy in accuracies_by_rate.values()],
                name=method,
                mode="lines+markers",
                line={"color": style.color, "dash": style.dash},
                marker={"symbol": style.symbol, "size": 9},
            )
        ticks = sorted({float(rate) for choice in cell.rates.values() for rate in choice.validation_accuracy})
        chart.update_xaxes(tickvals=ticks, ticktext=[f"{rate:g}" for rate in ticks])
        caption = (
            f"The highest point of a line is the method's rate. Mean over tuning seeds {join_words(cell.tuning_seeds)}."
        )
        figures.append(Figure(f"Learning rates: {label(cell)}", caption, chart))
    return figures


def predictors(results: StudyResults) -> list[Figure]:
    """Return the gain in test accuracy against each of `PREDICTORS`: a point per cell, method and seed."""
    figures, by_method = [], _styles(results)
    for metric, name, scale in PREDICTORS:
        points = gains_against(results, metric)
        if not points or (correlation := pearson(points)) is None:
            continue
        chart = empty_chart({"title": f"difference in {name}"}, {"title": "gain in test accuracy, points"})
        for method, of_method in points.items():
            style = by_method[method]
            x, y = np.array(of_method).T
            chart.add_scatter(
                x=scale * x,
                y=100 * y,
                name=method,
                mode="markers",
                marker={"color": style.color, "symbol": style.symbol, "size": 8, "opacity": 0.7},
            )
        number, shown = sum(map(len, points.values())), with_minus(correlation, "+.2f")
        caption = (
            f"Each mark is a seed in a cell, minus the baseline. {number} marks; Pearson correlation {shown}. "
            f"{_data(results)}"
        )
        figures.append(Figure(f"Gain against {name.partition(',')[0]}", caption, chart))
    return figures


def gains_against(results: StudyResults, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return method -> (`metric`, test accuracy) of each seed in each cell, both minus the baseline's.

    Methods that train the head alone are left out: they have no adapters to average.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in results.cells:
        training = cell.settings.differing.get("local-training", {})
        for method, differences in cell.differences.items():
            if metric not in differences.metrics:  # in results of earlier versions
                continue
            pairs = zip(differences.get(metric).values, differences.get("test_accuracy").values, strict=True)
            known = [(value, gain) for value, gain in pairs if value is not None and gain is not None]
            if known and training.get(method) != "head":
                points.setdefault(method, []).extend(known)
    return points


def pearson(points: Mapping[str, Sequence[tuple[float, float]]]) -> float | None:
    """Return the correlation over all points together; None if one of the coordinates varies by mere rounding."""
    x, y = np.array([point for of_method in points.values() for point in of_method]).T
    return float(np.corrcoef(x, y)[0, 1]) if min(np.ptp(x), np.ptp(y)) > ROUNDING else None


def _styles(results: StudyResults) -> dict[str, Style]:
    """Return the style of each method of any cell, the same in all charts."""
    return styles(dict.fromkeys(method for cell in results.cells for method in cell.methods))


def _by_cell(
    results: StudyResults, title: str, estimates: Callable[[CellResults], Mapping[str, MetricEstimates]]
) -> go.Figure:
    """Return a chart with the cells side by side, each with a point and interval of test accuracy per method."""
    cells = results.cells
    by_method = _styles(results)
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
    for place, (method, style) in enumerate(by_method.items()):
        shift = 0.6 * ((place + 0.5) / len(by_method) - 0.5)
        x, means, above, below = [], [], [], []
        for index, cell in enumerate(cells):
            if method not in estimates(cell):
                continue
            estimate = estimates(cell)[method].get("test_accuracy")
            if estimate.mean is not None:
                x.append(index + shift)
                means.append(100 * estimate.mean)
                low, high = estimate.interval or (None, None)
                above.append(None if high is None else 100 * (high - estimate.mean))
                below.append(None if low is None else 100 * (estimate.mean - low))
        if means:
            chart.add_scatter(
                x=x,
                y=means,
                name=method,
                mode="markers",
                marker={"color": style.color, "symbol": style.symbol, "size": 11},
                error_y={"array": above, "arrayminus": below, "thickness": 2, "width": 5},
                hovertemplate="%{y:.1f}",
            )
    return chart


def subject(results: StudyResults) -> str:
    """Return the models and data of all cells, each once."""
    settings = [cell.settings.common for cell in results.cells]
    pairs = [f"{without_folders(common['model'])} on {without_folders(common['dataset'])}" for common in settings]
    return join_words(dict.fromkeys(pairs))


def _data(results: StudyResults) -> str:
    """Return models and data, and the meaning of the cells' names, as a sentence."""
    return f"{subject(results)}; names of cells: rounds x local steps, split."
