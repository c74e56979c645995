"""Records of a study: results.json of a grid (`StudyResults`)."""

from __future__ import annotations

from copra_fl.records.comparison import ComparisonSummary, Estimate
from copra_fl.records.record import Record


class ChosenRate(Record):
    """The learning rate of a method, and the mean validation accuracy of every rate that was tried."""

    chosen: float
    validation_accuracy: dict[str, float]


class CellResults(ComparisonSummary):
    """One split in one regime of a study: the comparison on test seeds, and the choice of each method's rate."""

    split: str
    regime: str
    tuning_seeds: tuple[int, ...]
    rates: dict[str, ChosenRate]


class RankedMethod(Record):
    """One method over all cells of a grid.

    Attributes:
        ranks: split and regime of each cell -> place by mean test accuracy among the grid's methods, 1 for the best;
            equals share the mean of their places.
        mean_rank: over cells.
        test_accuracy: mean over cells of each seed's test accuracy.
        bytes, flops, seconds: of a run, means over seeds and cells; None where not measured.
    """

    method: str
    ranks: dict[str, float]
    mean_rank: float
    test_accuracy: Estimate
    bytes: float
    flops: float | None
    seconds: float


class RateRegret(Record):
    """Validation accuracy lost by learning rates that are not tuned, from the searches of all cells.

    Attributes:
        mean, worst: accuracy over the rates that all methods tried in a cell, then the mean over cells.
        by_rate: rates tried in all cells -> mean over cells of the accuracy of each cell's best rate minus this one's.
        fixed_rate: the rate with the lowest of these; None if no rate was tried in all cells.
        regret, worst_regret: of that rate: mean and maximum over cells.
    """

    mean: float | None
    worst: float | None
    by_rate: dict[str, float]
    fixed_rate: float | None
    regret: float | None
    worst_regret: float | None


class StudyResults(Record):
    """``results.json`` of one grid of a study: how it was made, and its cells.

    Attributes:
        ranking: of the methods that are in all cells, the best first; empty for one cell.
        rate_regret: method -> over the cells that it is in.
    """

    command: str
    versions: dict[str, str]
    machine: dict[str, str | int]
    cells: tuple[CellResults, ...]
    ranking: tuple[RankedMethod, ...] = ()
    rate_regret: dict[str, RateRegret] = {}
