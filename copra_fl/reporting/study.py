"""A study: a grid of comparisons, each method at the learning rate that is best for it on validation data.

A cell of the grid is one split in one regime (rounds x local steps). In its folder are two comparisons: ``rates``,
every method at every learning rate on tuning seeds, of which only validation data counts, and ``test``, every method at
the rate chosen, on other seeds. `write` gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from copra_fl import provenance
from copra_fl.config import Config
from copra_fl.files import atomic_write, write_json
from copra_fl.reporting import html
from copra_fl.reporting.figures import study as figures
from copra_fl.reporting.html import DataTable, Section
from copra_fl.reporting.results import Comparison, load_comparison
from copra_fl.reporting.statistics import estimate, metrics, summarize
from copra_fl.reporting.tables import AGGREGATION_ERROR, CLIENT_ACCURACY, MERGE_GAP, POINTS, TEST_ACCURACY, Column, note
from copra_fl.reporting.verdict import verdict

RATES, TEST = "rates", "test"
COLUMNS = (
    TEST_ACCURACY,
    replace(CLIENT_ACCURACY, interval=False),
    MERGE_GAP,
    Column("barrier (Entezari), loss", "barrier_entezari", spec="+.3f", interval=False),
    AGGREGATION_ERROR,
)


def rate_key(config: Config) -> str:
    """The learning rate that is chosen: of the adapters, or of the head where it is trained alone."""
    return "head-learning-rate" if config.copra.local_training == "head" else "learning-rate"


def tuned_name(method: str, rate: float) -> str:
    """What a method at one learning rate is called in ``rates``.

    >>> tuned_name("lora", 0.005)
    'lora@0.005'
    """
    return f"{method}@{rate:g}"


def rates_to_try(grid: Sequence[float], tried: Mapping[float, float]) -> list[float]:
    """The rates of `grid` that a method must try next, given the accuracies of those it has `tried`.

    It begins with the middle three and goes on until the best and both its neighbours have been tried. The same search
    for every method, it spends nothing on rates far from the best and does not stop where a better one lies beside it.

    >>> rates_to_try([1, 2, 5, 10, 20], {}), rates_to_try([1, 2, 5, 10, 20], {2: 0.3, 5: 0.4, 10: 0.5})
    ([2, 5, 10], [20])
    """
    grid = sorted(grid)
    centre = grid.index(best_rate(tried)) if tried else len(grid) // 2
    return [rate for rate in grid[max(0, centre - 1) : centre + 2] if rate not in tried]


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the highest accuracy; of equals the lowest."""
    return max(sorted(tried), key=tried.__getitem__)


def validation_accuracies(tuning: Comparison) -> dict[str, dict[float, float]]:
    """Method -> learning rate -> mean validation accuracy after the last round, where all runs have finished."""
    found: dict[str, dict[float, float]] = {}
    for name in tuning.methods:
        values = [metrics(end)["validation_accuracy"] for _, end in tuning.finished(name)]
        method, _, rate = name.rpartition("@")
        if len(values) == len(tuning.seeds) and (mean := estimate(values)["mean"]) is not None:
            found.setdefault(method, {})[float(rate)] = mean
    return found


def cell_results(cell: Path) -> dict[str, Any]:
    """``split``, ``regime``, the ``rates`` tried and chosen, and the test as `results.summarise` gives it."""
    tuning = load_comparison(cell / RATES)
    tried = validation_accuracies(tuning)
    return {
        "split": cell.parent.name,
        "regime": cell.name,
        "tuning_seeds": tuning.seeds,
        "rates": {
            method: {
                "chosen": best_rate(accuracies),
                "validation_accuracy": {f"{rate:g}": accuracies[rate] for rate in sorted(accuracies)},
            }
            for method, accuracies in tried.items()
        },
        **summarize(load_comparison(cell / TEST)),
    }


def write(directory: Path, cells: Sequence[Path], command: str) -> dict[str, Any]:
    """Write ``results.json`` and ``report.html`` of the grid in `directory`. Returns the results.

    They hold everything that a report or a document needs of the runs: the ``command``, versions, machine, and `cells`.
    """
    results = {
        "command": command,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "cells": [cell_results(cell) for cell in cells],
    }
    write_json(directory / "results.json", results)
    atomic_write(directory / "report.html", render(directory.name, results))
    return results


def render(name: str, results: Mapping[str, Any]) -> str:
    """The page of a grid's results."""
    settings = results["cells"][0]["settings"]["common"]
    return html.render(
        title=f"Study: {name}",
        setting=f"{settings['model']} on {settings['dataset']} · {results['command']}",
        verdict=" ".join(f"{figures.label(cell)}: {verdict(cell)}" for cell in results["cells"]),
        warnings=list(_at_edges(results)),
        results=[table(results)],
        sections=[
            Section("Accuracy", [*figures.gains(results), *figures.accuracies(results)]),
            Section("What goes with a gain", figures.predictors(results)),
            Section("Learning rates", figures.rates(results)),
        ],
    )


def table(results: Mapping[str, Any]) -> DataTable:
    """A row a cell and method: its rate, its test, and what averaging did."""
    rows = []
    for cell in results["cells"]:
        for method, found in cell["methods"].items():
            gain = cell["differences"].get(method, {}).get("test_accuracy")
            rate = f"{cell['rates'][method]['chosen']:g}"
            shown = (column.show(found.get(column.metric)) for column in COLUMNS)
            rows.append([figures.label(cell), method, rate, POINTS.show(gain) if gain else "", *shown])
    baseline = results["cells"][0]["baseline"]
    header = ["cell", "method", "rate", f"minus {baseline}, points", *(column.heading for column in COLUMNS)]
    return DataTable(header, rows, f"After the last round. {note(results['cells'][0])}")


def _at_edges(results: Mapping[str, Any]) -> Iterator[str]:
    for cell in results["cells"]:
        for method, found in cell["rates"].items():
            tried = [float(rate) for rate in found["validation_accuracy"]]
            if found["chosen"] in (min(tried), max(tried)):
                yield f"{figures.label(cell)}: the best rate of {method} is the last of the grid, {found['chosen']:g}."
