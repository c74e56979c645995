"""Results over all cells of a grid: a ranking of its methods, and the regret of learning rates that are not tuned.

Both follow from the cells alone, so they can also be computed from stored results of earlier versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from scipy.stats import rankdata

from copra_fl.records import CellResults, RankedMethod, RateRegret
from copra_fl.reporting.data_table import NO_VALUE, DataTable, with_minus
from copra_fl.reporting.figures.study import label
from copra_fl.reporting.statistics import estimate
from copra_fl.reporting.tables import POINTS, TEST_ACCURACY
from copra_fl.wording import join_words


def rank_methods(cells: Sequence[CellResults]) -> tuple[RankedMethod, ...]:
    """Return the methods that have a test accuracy in every one of several cells, by mean rank and then accuracy."""
    if len(cells) < 2:
        return ()
    methods = [
        method
        for method in cells[0].methods
        if all(method in cell.methods and cell.methods[method].get("test_accuracy").mean is not None for cell in cells)
    ]
    ranks: dict[str, dict[str, float]] = {method: {} for method in methods}
    for cell in cells:
        places = rankdata([-_mean(cell, method, "test_accuracy") for method in methods])
        for method, place in zip(methods, places, strict=True):
            ranks[method][label(cell)] = float(place)
    ranked = [_ranked(cells, method, ranks[method]) for method in methods]
    return tuple(sorted(ranked, key=lambda row: (row.mean_rank, -(row.test_accuracy.mean or 0.0))))


def _ranked(cells: Sequence[CellResults], method: str, ranks: dict[str, float]) -> RankedMethod:
    accuracies = [
        dict(zip(cell.methods[method].seeds, cell.methods[method].get("test_accuracy").values, strict=True))
        for cell in cells
    ]
    shared = sorted(set.intersection(*map(set, accuracies)))
    by_seed = [[value for cell in accuracies if (value := cell[seed]) is not None] for seed in shared]
    flops = [estimates.mean for cell in cells if (estimates := cell.methods[method].get("flops")).mean is not None]
    return RankedMethod(
        method=method,
        ranks=ranks,
        mean_rank=fmean(ranks.values()),
        test_accuracy=estimate(list(map(fmean, by_seed))),
        bytes=fmean(_mean(cell, method, "bytes") for cell in cells),
        flops=fmean(flops) if len(flops) == len(cells) else None,
        seconds=fmean(_mean(cell, method, "seconds") for cell in cells),
    )


def _mean(cell: CellResults, method: str, metric: str) -> float:
    mean = cell.methods[method].get(metric).mean
    assert mean is not None, f"{method} was measured in every cell"
    return mean


def rate_regret(cells: Sequence[CellResults]) -> dict[str, RateRegret]:
    """Return the regret of each method, from the validation accuracies by which its rate was chosen.

    The search tries other rates for other methods, so mean and worst are over the rates that all methods tried. Methods
    that train the head alone are left out: their rate is another one.
    """
    searches = [_searches(cell) for cell in cells]
    shared = [set.intersection(*map(set, by_method.values())) if by_method else set() for by_method in searches]
    methods = dict.fromkeys(method for by_method in searches for method in by_method)
    return {
        method: _regret(
            [by_method[method] for by_method in searches if method in by_method],
            [rates for by_method, rates in zip(searches, shared, strict=True) if method in by_method],
        )
        for method in methods
    }


def _regret(searches: Sequence[dict[float, float]], shared: Sequence[set[float]]) -> RateRegret:
    """Return the regret of one method; `searches` are rate -> accuracy in each cell, `shared` the rates of all."""
    compared = [[search[rate] for rate in rates] for search, rates in zip(searches, shared, strict=True)]
    everywhere = sorted(set.intersection(*map(set, searches)))
    losses = {rate: [max(search.values()) - search[rate] for search in searches] for rate in everywhere}
    fixed = min(losses, key=lambda rate: fmean(losses[rate]), default=None)
    return RateRegret(
        mean=fmean(map(fmean, compared)) if all(compared) else None,
        worst=fmean(map(min, compared)) if all(compared) else None,
        by_rate={f"{rate:g}": fmean(of_cells) for rate, of_cells in losses.items()},
        fixed_rate=fixed,
        regret=None if fixed is None else fmean(losses[fixed]),
        worst_regret=None if fixed is None else max(losses[fixed]),
    )


def _searches(cell: CellResults) -> dict[str, dict[float, float]]:
    """Return method -> rate of the adapters -> validation accuracy."""
    training = cell.settings.differing.get("local-training", {})
    return {
        method: {float(rate): accuracy for rate, accuracy in choice.validation_accuracy.items()}
        for method, choice in cell.rates.items()
        if training.get(method) != "head"
    }


def ranking_table(cells: Sequence[CellResults], ranked: Sequence[RankedMethod]) -> list[DataTable]:
    """Return one row per method: mean rank, accuracy over all cells, paired difference in each cell, cost."""
    if not ranked:
        return []
    baseline = cells[0].baseline
    with_flops = any(row.flops is not None for row in ranked)
    rows = []
    for row in ranked:
        gains = [
            POINTS.show(cell.differences[row.method].get(POINTS.metric)) if row.method in cell.differences else ""
            for cell in cells
        ]
        work = [] if not with_flops else [NO_VALUE if row.flops is None else f"{1e-12 * row.flops:.4g}"]
        costs = [f"{1e-6 * row.bytes:.1f}", *work, f"{row.seconds:.0f}"]
        rows.append([row.method, f"{row.mean_rank:.1f}", TEST_ACCURACY.show(row.test_accuracy), *gains, *costs])
    header = [
        "method",
        "mean rank",
        "test accuracy, %",
        *(f"minus {baseline}: {label(cell)}" for cell in cells),
        "MB up and down",
        *(["TFLOPs"] if with_flops else []),
        "seconds",
    ]
    caption = (
        f"Each method at its own learning rate in each cell. Ranks are by mean test accuracy in a cell; test accuracy, "
        f"cost and rank are means over the {len(cells)} cells, differences are in points and paired by seed; in "
        "brackets: 95 % t-interval over seeds."
    )
    methods = dict.fromkeys(method for cell in cells for method in cell.methods)
    if left_out := [method for method in methods if method not in {row.method for row in ranked}]:
        caption += f" Left out, without a test accuracy in every cell: {join_words(left_out)}."
    return [DataTable(header, rows, caption, title="Ranking over all cells")]


def regret_table(regrets: dict[str, RateRegret], num_cells: int) -> DataTable:
    """Return one row per method: accuracy over untuned rates, and the regret of one rate for all cells."""

    def percent(value: float | None, spec: str = ".1f") -> str:
        return NO_VALUE if value is None else with_minus(100 * value, spec)

    rows = [
        [
            method,
            percent(regret.mean),
            percent(regret.worst),
            NO_VALUE if regret.fixed_rate is None else f"{regret.fixed_rate:g}",
            percent(regret.regret),
            percent(regret.worst_regret),
        ]
        for method, regret in regrets.items()
    ]
    header = [
        "method",
        "mean over rates, %",
        "worst rate, %",
        "best rate for all cells",
        "its regret, points",
        "regret in the worst cell, points",
    ]
    cells = "1 cell" if num_cells == 1 else f"{num_cells} cells"
    caption = (
        "Validation accuracy in the searches, on tuning seeds. Mean and worst: over the learning rates that all "
        f"methods tried in a cell, then over {cells}. Regret: accuracy of the best rate of a cell minus that of the "
        "one rate that is best for all cells, of those tried in all; it is chosen in hindsight, so it is a lower limit."
    )
    return DataTable(header, rows, caption, title="Learning rates that are not tuned")
