"""Result tables of a comparison, and `Column`: the format of one metric in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

from copra_fl.config import FederationConfig
from copra_fl.records import MIN_SEEDS, ComparisonSummary, ConfigValue, Estimate, MetricEstimates
from copra_fl.reporting.data_table import NO_VALUE, DataTable, with_minus
from copra_fl.wording import join_words

#: more methods than this have the difference to the baseline in a column instead of in rows
MAX_ROWS_OF_DIFFERENCES = 2


@dataclass(frozen=True)
class Column:
    """Heading and format of one of `statistics.metrics`.

    Attributes:
        scale: factor to the unit shown.
        spec: Python format of the number.
        interval: show the 95 % interval after the mean.
    """

    heading: str
    metric: str
    scale: float = 1.0
    spec: str = ".1f"
    interval: bool = True

    def format(self, value: float | None) -> str:
        """Return `value` in the unit shown; an en dash for None."""
        return NO_VALUE if value is None else with_minus(self.scale * value, self.spec)

    def show(self, estimate: Estimate) -> str:
        """Return ``mean [low, high]``, or the mean alone."""
        if not (self.interval and estimate.interval):
            return self.format(estimate.mean)
        low, high = estimate.interval
        return f"{self.format(estimate.mean)} [{self.format(low)}, {self.format(high)}]"


TEST_ACCURACY = Column("test accuracy, %", "test_accuracy", scale=100)
VALIDATION_ACCURACY = Column("validation accuracy, %", "validation_accuracy", scale=100)
TEST_LOSS = Column("test loss", "test_loss", spec=".3f")
POINTS = replace(TEST_ACCURACY, spec="+.1f")
CLIENT_ACCURACY = Column("client accuracy, %", "client_accuracy", scale=100)
MACRO_F1 = Column("macro-F1, %", "test_macro_f1", scale=100, interval=False)
BALANCED_ACCURACY = Column("balanced accuracy, %", "test_balanced_accuracy", scale=100, interval=False)
AGGREGATION_ERROR = Column("aggregation error, %", "aggregation_error", scale=100, interval=False)
ERROR_OF_CHANGE = Column("aggregation error, % of the change", "aggregation_error_of_change", scale=100, interval=False)
MERGE_GAP = Column("merge gap, points", "merge_gap_accuracy", scale=100, spec="+.1f")
COST = (
    Column("MB up", "bytes_up", scale=1e-6, interval=False),
    Column("MB down", "bytes_down", scale=1e-6, interval=False),
    Column("seconds", "seconds", spec=".0f", interval=False),
)
PASSES = Column("passes over own data", "passes", spec=".2f", interval=False)
FLOPS = Column("TFLOPs of training", "flops", scale=1e-12, spec=".4g", interval=False)
ROUNDS = Column("rounds", "rounds", spec=".4g", interval=False)
WORK = (
    ROUNDS,
    Column("steps per client", "steps", spec=".4g", interval=False),
    PASSES,
    Column("lowest client", "passes_lowest", spec=".2f", interval=False),
    Column("highest client", "passes_highest", spec=".2f", interval=False),
    FLOPS,
    *COST,
)
#: metrics of what a method must exceed -> name in tables
REFERENCES = {"majority": "majority class", "base_accuracy": "before round 1"}
#: metrics whose columns are left out if no method has them
OPTIONAL = ("test_macro_f1", "test_balanced_accuracy", "aggregation_error_of_change")
#: shown only if measured: not every task and split has them
OPTIONAL_COLUMNS = (
    Column("held-out clients, %", "held_out_accuracy", scale=100),
    Column("test perplexity", "test_perplexity", spec=".2f"),
    Column("held-out perplexity", "held_out_perplexity", spec=".2f"),
)
#: by which a user decides; they fit a terminal of 80 columns
COLUMNS = (TEST_ACCURACY, Column("MB", "bytes", scale=1e-6, interval=False), COST[-1])


def results_table(summary: ComparisonSummary, columns: Sequence[Column] = COLUMNS, caption: str = "") -> DataTable:
    """Return one row per method: up to two methods with their difference in a row, more with one in a column.

    `columns` begins with the test accuracy, which `compared_by` may replace. The last rows are what a method must
    exceed: the accuracy of always predicting the most frequent class (majority class), and of the model before round 1.
    """
    lead = compared_by(summary)
    columns = [
        replace(lead, interval=column.interval) if column.metric == TEST_ACCURACY.metric else column
        for column in columns
    ]
    columns = [column for column in columns if column.metric not in OPTIONAL or measured([column], [summary])]
    headings = [column.heading for column in columns]
    if not has_many_methods(summary):
        cells = rows(summary, columns)
        dividers = {len(summary.methods), len(cells)}
        cells += [[name, value, *[""] * (len(columns) - 1)] for name, value in references(summary)]
        dividers.discard(len(cells))
        return DataTable(["method", *headings], cells, f"{caption} {note(summary, cells)}".lstrip(), dividers=dividers)
    header = ["method", headings[0], f"minus {summary.baseline}, points", *headings[1:]]
    narrow = [columns[0], *(replace(column, interval=False) for column in columns[1:])]
    points = replace(POINTS, metric=lead.metric, interval=columns[0].interval)
    cells = []
    for method in ordered(summary):
        name, accuracy, *others = _cells(summary, method, narrow)
        difference = "" if method == summary.baseline else points.show(summary.differences[method].get(points.metric))
        cells.append([name, accuracy, difference, *others])
    lines = [[name, value, *[""] * (len(header) - 2)] for name, value in references(summary)]
    caption = f"{caption} {note(summary, cells)}".lstrip()
    return DataTable(header, [*cells, *lines], caption, dividers={len(cells)} if lines else ())


def compared_by(summary: ComparisonSummary) -> Column:
    """Return the test accuracy, by which methods are compared; without ``final-test`` the validation accuracy."""
    on_validation = measured([VALIDATION_ACCURACY], [summary]) and not measured([TEST_ACCURACY], [summary])
    return VALIDATION_ACCURACY if on_validation else TEST_ACCURACY


def references(summary: ComparisonSummary) -> list[tuple[str, str]]:
    """Return name and test accuracy of what needs no training, as far as it was measured."""
    baseline = summary.methods[summary.baseline]
    return [
        (name, TEST_ACCURACY.format(mean))
        for metric, name in REFERENCES.items()
        if (mean := baseline.get(metric).mean) is not None
    ]


def no_better_than_majority(summary: ComparisonSummary) -> list[str]:
    """Return a warning that names the methods that do no better than always predicting the most frequent class."""
    majority = summary.methods[summary.baseline].get("majority").mean
    worse = [
        f"{method} ({TEST_ACCURACY.format(mean)} %)"
        for method, estimates in summary.methods.items()
        if majority is not None and (mean := estimates.get("test_accuracy").mean) is not None and mean <= majority
    ]
    if not worse or majority is None:
        return []
    shown = TEST_ACCURACY.format(majority)
    return [f"No better than always predicting the most frequent class ({shown} %): {join_words(worse)}."]


def dataset_tables(summary: ComparisonSummary) -> list[DataTable]:
    """Return a table with the test on each of several data sets; an empty list for one data set."""
    prefix = f"{TEST_ACCURACY.metric}/"
    names = dict.fromkeys(
        metric.removeprefix(prefix)
        for estimates in summary.methods.values()
        for metric in estimates.metrics
        if metric.startswith(prefix)
    )
    columns = {
        name: [replace(column, metric=f"{column.metric}/{name}") for column in (TEST_ACCURACY, TEST_LOSS)]
        for name in names
    }
    cells = [[name, *row] for name in names for row in rows(summary, columns[name])]
    if not cells:
        return []
    dividers = [number for number, (row, next_row) in enumerate(pairwise(cells), start=1) if row[0] != next_row[0]]
    header = ["data set", "method", TEST_ACCURACY.heading, TEST_LOSS.heading]
    caption = "Each data set by itself; the table above has means over data sets, all with equal weight."
    return [DataTable(header, cells, caption, dividers=dividers)]


def optional_columns(summary: ComparisonSummary) -> list[Column]:
    """Return those of `OPTIONAL_COLUMNS` that at least one method has."""
    return measured(OPTIONAL_COLUMNS, [summary])


def measured(columns: Sequence[Column], summaries: Sequence[ComparisonSummary]) -> list[Column]:
    """Return those of `columns` that at least one method of one of `summaries` has."""
    estimates = [of_method for summary in summaries for of_method in summary.methods.values()]
    return [
        column
        for column in columns
        if any(value is not None for of_method in estimates for value in of_method.get(column.metric).values)
    ]


def work_table(summary: ComparisonSummary) -> DataTable:
    """Return the work of each method: rounds, steps, passes over own data, operations, bytes, seconds."""
    columns = measured(WORK, [summary])
    caption = (
        "Of a whole run, means over seeds. Passes over own data: steps x batch / training examples of a client, mean "
        "over clients, and of the clients with the fewest and the most. TFLOPs: estimated operations of all clients' "
        "training; below the lowest layer that is on, no backward pass is needed."
    )
    rows = [_cells(summary, method, columns) for method in summary.methods]
    return DataTable(["method", *(column.heading for column in columns)], rows, caption, title="Work of a run")


def passes(estimates: MetricEstimates) -> str:
    """Return the passes over own data: ``mean (lowest to highest)`` over clients, means over seeds."""
    mean, lowest, highest = (PASSES.format(estimates.get(f"passes{end}").mean) for end in ("", "_lowest", "_highest"))
    return f"{mean} ({lowest} to {highest})"


def target_table(summary: ComparisonSummary) -> list[DataTable]:
    """Return the cost of each method until its validation accuracy first reached the target.

    Returns an empty list if no run was evaluated more than once.
    """
    if not summary.to_target or not any(len(curve.rounds) > 1 for curve in summary.curves.values()):
        return []
    rows = []
    for method, cost in summary.to_target.items():
        reached = sum(number is not None for number in cost.rounds)
        values = [(ROUNDS, cost.rounds), (COST[0], cost.bytes_up), (COST[0], cost.bytes), (FLOPS, cost.flops)]
        means = [column.format(_mean_of_all(by_seed)) for column, by_seed in values]
        rows.append([method, f"{reached} of {len(cost.seeds)}", *means])
    goals = {goal for cost in summary.to_target.values() for goal in cost.targets}
    if len(goals) == 1:
        goal = f"a validation accuracy of {100 * goals.pop():.1f} %"
    else:
        goal = f"the validation accuracy that {summary.baseline} ends with, paired by seed"
    caption = f"Up to the first evaluation that reaches {goal}. Means over seeds, if all reached it."
    header = ["method", "seeds that reached it", "rounds", "MB up", "MB up and down", "TFLOPs of training"]
    return [DataTable(header, rows, caption, title="Cost of a validation accuracy")]


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """Return the mean of `values`; None if one of them is None, or without values."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def early_ends(summary: ComparisonSummary) -> list[str]:
    """Return a sentence for each method and reason for which runs ended before num-rounds."""
    runs: dict[tuple[str, str], list[str]] = {}
    for end in summary.ended_early:
        runs.setdefault((end.method, end.reason), []).append(f"seed {end.seed} in round {end.round}")
    return [f"{method} ended early: {join_words(ends)} ({reason})." for (method, reason), ends in runs.items()]


def merge_gap_note(settings: Mapping[str, ConfigValue]) -> str:
    """Return a sentence on the number of clients of which the merge gap is known; empty where it is not measured."""
    evaluated, all_clients = settings.get("merge-gap-clients"), _clients_of_a_round(settings)
    if not evaluated or all_clients is None:
        return ""
    return f" The merge gap is that of {min(int(evaluated), all_clients)} of the {all_clients} clients of a round."


def client_accuracy_note(settings: Mapping[str, ConfigValue]) -> str:
    """Return a sentence on the sample of clients behind the client accuracy; empty if all clients evaluate."""
    evaluating, all_clients = settings.get("client-eval-clients"), settings.get("num-clients")
    if not evaluating or (all_clients and int(evaluating) >= int(all_clients)):
        return ""
    return (
        f" Client accuracy is that of {evaluating} clients, drawn anew for each seed, so that an interval over seeds "
        "includes the error of the draw."
    )


def barrier_note(settings: Mapping[str, ConfigValue]) -> str:
    """Return a sentence on the limits of a measured barrier; empty where no line is evaluated."""
    lines, points = settings.get("path-pairs"), settings.get("path-points")
    if not (lines and points):
        return ""
    return (
        f" A barrier is the highest of {points} points of a line, ends included, so it is never below 0; heads move "
        f"along the line with the adapters. It is the mean over {lines} line{'s' if int(lines) > 1 else ''} of a run."
    )


def _clients_of_a_round(settings: Mapping[str, ConfigValue]) -> int | None:
    """Return the number of clients asked in a round; None if settings differ, or each node is a client."""
    known = [settings.get(key) for key in ("num-clients", "fraction-clients", "clients-per-round")]
    if None in known or not known[0]:
        return None
    num_clients, fraction, number = (float(value) for value in known if value is not None)
    return FederationConfig(fraction_clients=fraction, clients_per_round=int(number)).round_size(int(num_clients))


def has_many_methods(summary: ComparisonSummary) -> bool:
    """Return True if there are so many methods that their differences to the baseline are in a column."""
    return len(summary.methods) > MAX_ROWS_OF_DIFFERENCES


def significant(summary: ComparisonSummary) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the methods significantly above and below the baseline: the interval of the difference excludes 0."""
    metric = compared_by(summary).metric
    intervals = {
        method: interval
        for method, differences in summary.differences.items()
        if len(differences.seeds) >= MIN_SEEDS and (interval := differences.get(metric).interval)
    }
    above = tuple(method for method, (low, _) in intervals.items() if low > 0)
    return above, tuple(method for method, (_, high) in intervals.items() if high < 0)


def ordered(summary: ComparisonSummary) -> list[str]:
    """Return the methods by the accuracy of `compared_by`, the highest first and those without it (yet) last.

    If none differs significantly from the baseline, those with an accuracy are in the order of the comparison.
    """
    metric, is_decided = compared_by(summary).metric, any(significant(summary))

    def order(method: str) -> tuple[bool, bool, float]:
        mean = summary.methods[method].get(metric).mean
        return method in summary.personal, mean is None, -(mean or 0.0) if is_decided else 0.0

    return sorted(summary.methods, key=order)


def rows(summary: ComparisonSummary, columns: Sequence[Column]) -> list[list[str]]:
    """Return one row per method; for two methods also a row for the second minus the first."""
    signed = [replace(column, spec="+" + column.spec.lstrip("+")) for column in columns]
    differences = {} if has_many_methods(summary) else summary.differences
    return [_cells(summary, method, columns) for method in summary.methods] + [
        [f"{method} − {summary.baseline}", *(column.show(estimates.get(column.metric)) for column in signed)]
        for method, estimates in differences.items()
    ]


def _cells(summary: ComparisonSummary, method: str, columns: Sequence[Column]) -> list[str]:
    """Return the method's name, with the number of seeds if some have not finished, and its numbers."""
    estimates = summary.methods[method]
    finished, planned = len(estimates.seeds), len(summary.seeds)
    cells = {column.metric: column.show(estimates.get(column.metric)) for column in columns}
    if method in summary.personal and TEST_ACCURACY.metric in cells:
        cells[TEST_ACCURACY.metric] = "none"
    return [method if finished == planned else f"{method} ({finished} of {planned} seeds)", *cells.values()]


def note(summary: ComparisonSummary, cells: Sequence[Sequence[str]]) -> str:
    """Return the seeds, the meaning of the brackets in `cells`, and the reason of a missing test accuracy."""
    seeds = summary.seeds
    text = f"Means over seeds {join_words(seeds)}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    if any(" [" in cell for row in cells for cell in row):
        text += "; in brackets: 95 % t-interval"
    if len(seeds) > 1 and summary.differences:
        text += "; differences are paired by seed"
    if summary.personal:
        text += ". Test accuracy none: there is no global model, each client keeps its own"
    return f"{text}."
