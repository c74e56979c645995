"""Results by class: confusion matrices of the final test, and precision, recall and F1 of each class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from copra_fl.class_metrics import by_class
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.figures.canvas import started
from copra_fl.reporting.html import HEIGHT, Figure, colorbar, empty_chart
from copra_fl.reporting.results import Comparison

#: methods whose confusion is drawn: the first one, which the others are compared with, and the best others
MAX_METHODS = 4
SCORES = ("recall", "precision", "f1")
#: with more classes no percentages are written into the cells
MAX_WRITTEN = 12


def confusions(comparison: Comparison) -> list[Figure]:
    """Return a heat map per method: of the test examples of a class, the percentage predicted as each class."""
    matrices = dict(_matrices(comparison))
    baseline = next(iter(matrices), None)
    best = sorted(matrices, key=lambda method: (method != baseline, -_accuracy(matrices[method][1])))
    figures = []
    for method in best[:MAX_METHODS]:
        labels, counts = matrices[method]
        color = next(style.color for name, _, style in started(comparison) if name == method)
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        chart = empty_chart({"title": "predicted"}, {"title": "class", "autorange": "reversed"})
        chart.add_heatmap(
            x=labels,
            y=labels,
            z=shares,
            customdata=counts,
            zmin=0,
            zmax=100,
            colorscale=[[0, "#ffffff"], [1, color]],
            colorbar=colorbar("% of the class"),
            texttemplate="%{z:.0f}" if len(labels) <= MAX_WRITTEN else None,
            hovertemplate="%{y} predicted as %{x}: %{z:.1f} %, %{customdata} examples<extra></extra>",
        )
        chart.update_xaxes(type="category", showgrid=False, tickangle=-45, dtick=1)
        chart.update_yaxes(type="category", showgrid=False, dtick=1)
        chart.update_layout(height=max(HEIGHT, 150 + 20 * len(labels)), showlegend=False, margin={"t": 10})
        caption = (
            "Of the test examples of a class (a row), the percentage that is predicted as each class. A dark diagonal "
            "is good; a dark column is a class that is predicted too often. Examples of "
            f"{comparison.named_seeds} together."
        )
        figures.append(Figure(f"Confusion with {method}", caption, chart))
    return figures


def class_tables(comparison: Comparison) -> list[DataTable]:
    """Return a table per method: examples, recall, precision and F1 of each class in the final test."""
    caption = f"In %, over the test examples of {comparison.named_seeds} together; examples: mean per seed."
    tables = []
    for method, (labels, counts) in _matrices(comparison):
        scores, seeds = by_class(counts), len(comparison.finished(method))
        rows = [
            [
                label,
                f"{scores['examples'][index] / seeds:.0f}",
                *(f"{100 * scores[name][index]:.1f}" for name in SCORES),
            ]
            for index, label in enumerate(labels)
        ]
        tables.append(DataTable(["class", "examples", "recall", "precision", "F1"], rows, caption, title=method))
    return tables


def _matrices(comparison: Comparison) -> Iterator[tuple[str, tuple[list[str], npt.NDArray[np.int64]]]]:
    """Yield (method, (labels, confusion matrix summed over seeds)) of each method with such matrices."""
    for method in comparison.methods:
        tests = [(summary.labels, summary.test) for _, summary in comparison.finished(method)]
        matrices = [np.array(test.confusion) for _, test in tests if test and test.confusion]
        if matrices and len({matrix.shape for matrix in matrices}) == 1:
            yield method, (list(tests[0][0]), np.sum(matrices, axis=0))


def _accuracy(counts: npt.NDArray[np.int64]) -> float:
    return float(counts.trace() / counts.sum())
