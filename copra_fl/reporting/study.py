"""Results of a study: a grid of comparisons, each method at the learning rate that is best for it on validation data.

A cell of the grid is one split in one regime (rounds x local steps). Its folder has two comparisons: ``rates`` runs
every method at several learning rates on tuning seeds, of which only validation data is used; ``test`` runs every
method at its chosen rate on other seeds. `write` collects them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from copra_fl import provenance
from copra_fl.config import Config
from copra_fl.files import atomic_write, write_json
from copra_fl.records import CellResults, ChosenRate, StudyResults
from copra_fl.reporting import html
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.figures import cost
from copra_fl.reporting.figures import study as figures
from copra_fl.reporting.grid import rank_methods, ranking_table, rate_regret, regret_table
from copra_fl.reporting.html import Section
from copra_fl.reporting.results import Comparison, load_comparison
from copra_fl.reporting.statistics import estimate, metrics, summarize
from copra_fl.reporting.tables import (
    AGGREGATION_ERROR,
    CLIENT_ACCURACY,
    ERROR_OF_CHANGE,
    MERGE_GAP,
    PASSES,
    POINTS,
    TEST_ACCURACY,
    Column,
    barrier_note,
    early_ends,
    measured,
    merge_gap_note,
    note,
    passes,
    target_table,
)
from copra_fl.reporting.verdict import verdict

RATES, TEST = "rates", "test"
COLUMNS = (TEST_ACCURACY, replace(CLIENT_ACCURACY, interval=False))
AVERAGING_COLUMNS = (
    MERGE_GAP,
    Column("barrier (Entezari), loss", "barrier_entezari", spec="+.3f", interval=False),
    AGGREGATION_ERROR,
    ERROR_OF_CHANGE,
)


def rate_key(config: Config) -> str:
    """Return the key of the learning rate that is tuned: the adapters', or the head's where it is trained alone."""
    return "head-learning-rate" if config.copra.local_training == "head" else "learning-rate"


def tuned_name(method: str, rate: float) -> str:
    """Return the name of a method at one learning rate in ``rates``.

    >>> tuned_name("lora", 0.005)
    'lora@0.005'
    """
    return f"{method}@{rate}"


def rates_to_try(grid: Sequence[float], tried: Mapping[float, float]) -> list[float]:
    """Return the rates of `grid` that a method must try next, given the accuracies of those it has `tried`.

    The search begins with the middle three and ends when the best rate and both its neighbors have been tried. It is
    the same for every method, spends nothing on rates far from the best, and does not stop beside a better rate.

    >>> rates_to_try([1, 2, 5, 10, 20], {}), rates_to_try([1, 2, 5, 10, 20], {2: 0.3, 5: 0.4, 10: 0.5})
    ([2, 5, 10], [20])
    """
    grid = sorted(grid)
    center = grid.index(best_rate(tried)) if tried else len(grid) // 2
    return [rate for rate in grid[max(0, center - 1) : center + 2] if rate not in tried]


def best_rate(tried: Mapping[float, float]) -> float:
    """Return the rate with the highest accuracy; of equals the lowest."""
    return max(sorted(tried), key=tried.__getitem__)


def validation_accuracies(tuning: Comparison) -> dict[str, dict[float, float]]:
    """Return method -> learning rate -> mean final validation accuracy, for rates at which all runs have finished."""
    accuracies: dict[str, dict[float, float]] = {}
    for name in tuning.methods:
        values = [metrics(run)["validation_accuracy"] for run in tuning.finished_runs(name)]
        method, _, rate = name.rpartition("@")
        if len(values) == len(tuning.seeds) and (mean := estimate(values).mean) is not None:
            accuracies.setdefault(method, {})[float(rate)] = mean
    return accuracies


def cell_results(cell: Path) -> CellResults:
    """Return the results of the two comparisons in the folder `cell`."""
    tuning = load_comparison(cell / RATES)
    return CellResults(
        split=cell.parent.name,
        regime=cell.name,
        tuning_seeds=tuple(tuning.seeds),
        rates={
            method: ChosenRate(
                chosen=best_rate(accuracies),
                validation_accuracy={str(rate): accuracies[rate] for rate in sorted(accuracies)},
            )
            for method, accuracies in validation_accuracies(tuning).items()
        },
        **dict(summarize(load_comparison(cell / TEST))),
    )


def write(directory: Path, cells: Sequence[Path], command: str) -> StudyResults:
    """Write ``results.json`` and ``report.html`` of the grid with the folders `cells` to `directory`.

    Returns the results: all that a report or a document needs of the runs, with `command`, versions and machine.
    """
    of_cells = tuple(cell_results(cell) for cell in cells)
    results = StudyResults(
        command=command,
        versions=provenance.versions(),
        machine=provenance.machine(),
        cells=of_cells,
        ranking=rank_methods(of_cells),
        rate_regret=rate_regret(of_cells),
    )
    write_json(directory / "results.json", results.model_dump(mode="json"))
    atomic_write(directory / "report.html", render(directory.name, results))
    return results


def render(name: str, results: StudyResults) -> str:
    """Return the page of a grid's results as HTML."""
    return html.render(
        title=f"Study: {name}",
        setting=f"{figures.subject(results)} · {results.command}",
        verdict=" ".join(f"{figures.label(cell)}: {verdict(cell).text}" for cell in results.cells),
        warnings=[*_rates_at_edges(results), *_early_ends(results)],
        results=[table(results), *ranking_table(results.cells, results.ranking)],
        sections=[
            Section("Accuracy", [*figures.gains(results), *figures.accuracies(results)]),
            *_costs(results),
            Section("Averaging", figures.predictors(results), [averaging_table(results)]),
            Section(
                "Learning rates",
                figures.rates(results),
                [regret_table(results.rate_regret, len(results.cells))] if results.rate_regret else [],
            ),
        ],
    )


def _costs(results: StudyResults) -> Iterator[Section]:
    """Yield the accuracy against bytes and operations in each cell that was evaluated more than once."""
    for cell in results.cells:
        charts = cost.accuracy_for_cost(cell)
        if charts:
            last = replace(charts[-1], wide=len(charts) % 2 == 1 or charts[-1].wide)  # leaves no hole in two columns
            yield Section(f"Accuracy for cost: {figures.label(cell)}", [*charts[:-1], last], target_table(cell))


def table(results: StudyResults) -> DataTable:
    """Return one row per cell and method: its rate, its results and its passes over own data."""
    rows, has_passes = [], bool(measured([PASSES], results.cells))
    for cell in results.cells:
        for method, estimates in cell.methods.items():
            gain = POINTS.show(cell.differences[method].get(POINTS.metric)) if method in cell.differences else ""
            rate = f"{cell.rates[method].chosen:g}"
            shown = [column.show(estimates.get(column.metric)) for column in COLUMNS]
            rows.append([figures.label(cell), method, rate, gain, *shown, *([passes(estimates)] if has_passes else [])])
    first = results.cells[0]
    header = ["cell", "method", "rate", f"minus {first.baseline}, points", *(column.heading for column in COLUMNS)]
    caption = f"After the last round. {note(first, rows)}"
    if has_passes:
        header.append(PASSES.heading)
        caption += " Passes: mean over clients, and the clients with the fewest and the most."
    return DataTable(header, rows, caption)


def averaging_table(results: StudyResults) -> DataTable:
    """Return one row per cell and method: the metrics of averaging."""
    columns = measured(AVERAGING_COLUMNS, results.cells)
    rows = [
        [figures.label(cell), method, *(column.show(estimates.get(column.metric)) for column in columns)]
        for cell in results.cells
        for method, estimates in cell.methods.items()
    ]
    settings = results.cells[0].settings.common
    caption = f"After the last round; errors are means over rounds.{merge_gap_note(settings)}{barrier_note(settings)}"
    return DataTable(["cell", "method", *(column.heading for column in columns)], rows, caption)


def _early_ends(results: StudyResults) -> Iterator[str]:
    for cell in results.cells:
        yield from (f"{figures.label(cell)}: {sentence}" for sentence in early_ends(cell))


def _rates_at_edges(results: StudyResults) -> Iterator[str]:
    for cell in results.cells:
        for method, choice in cell.rates.items():
            tried = [float(rate) for rate in choice.validation_accuracy]
            if choice.chosen in (min(tried), max(tried)):
                yield (
                    f"{figures.label(cell)}: the best rate of {method}, {choice.chosen:g}, is at the edge of the rates "
                    "tried; a better one may be outside."
                )
