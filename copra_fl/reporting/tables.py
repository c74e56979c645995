"""What a comparison says, in words and in cells: the verdict, the results of two methods, the ranking of many."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from copra_fl.reporting.statistics import Estimate
from copra_fl.wording import join_words

#: more methods than this are ranked, and compared with the first in a column, not in a row each
MAX_ROWS_OF_DIFFERENCES = 2


@dataclass(frozen=True)
class Column:
    """How one of `results.metrics` is shown: its heading, the factor to the unit shown, and the digits."""

    heading: str
    metric: str
    scale: float = 1.0
    spec: str = ".1f"
    interval: bool = True

    def format(self, value: float | None) -> str:
        """`value` in the unit shown; an en dash where there is none."""
        return "–" if value is None else f"{self.scale * value:{self.spec}}".replace("-", "−")

    def show(self, found: Estimate | None) -> str:
        """``mean [low, high]``."""
        if found is None or not (self.interval and found["interval"]):
            return self.format(found and found["mean"])
        low, high = found["interval"]
        return f"{self.format(found['mean'])} [{self.format(low)}, {self.format(high)}]"


TEST_ACCURACY = Column("test accuracy, %", "test_accuracy", scale=100)
TEST_LOSS = Column("test loss", "test_loss", spec=".3f")
POINTS = replace(TEST_ACCURACY, spec="+.1f")
CLIENT_ACCURACY = Column("clients' own data, %", "client_accuracy", scale=100)
AGGREGATION_ERROR = Column("aggregation error, %", "aggregation_error", scale=100, interval=False)
MERGE_GAP = Column("merge gap, points", "merge_gap_accuracy", scale=100, spec="+.1f")
COST = (
    Column("MB up", "bytes_up", scale=1e-6, interval=False),
    Column("MB down", "bytes_down", scale=1e-6, interval=False),
    Column("seconds", "seconds", spec=".0f", interval=False),
)
#: what only some tasks and splits have; ppl: perplexity
OF_SOME = (
    Column("held-out clients, %", "held_out_accuracy", scale=100),
    Column("test ppl", "test_perplexity", spec=".2f"),
    Column("held-out ppl", "held_out_perplexity", spec=".2f"),
)
#: what fits a terminal
COLUMNS = (TEST_ACCURACY, replace(CLIENT_ACCURACY, interval=False), AGGREGATION_ERROR, *COST)


def also_measured(summary: Mapping[str, Any]) -> list[Column]:
    """Those of `OF_SOME` that a method has."""
    methods = summary["methods"].values()
    return [
        column for column in OF_SOME if any(any(found.get(column.metric, {}).get("values", ())) for found in methods)
    ]


def by_dataset(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what is told of each of several data sets; no rows where there is one."""
    prefix = f"{TEST_ACCURACY.metric}/"
    names = dict.fromkeys(
        metric.removeprefix(prefix)
        for found in summary["methods"].values()
        for metric in found
        if metric.startswith(prefix)
    )
    columns = {
        name: [replace(column, metric=f"{column.metric}/{name}") for column in (TEST_ACCURACY, TEST_LOSS)]
        for name in names
    }
    told = [[name, *row] for name in names for row in rows(summary, columns[name])]
    return ["data set", "method", TEST_ACCURACY.heading, TEST_LOSS.heading], told


def is_ranked(summary: Mapping[str, Any]) -> bool:
    """Whether there are so many methods that they are shown as a ranking."""
    return len(summary["methods"]) > MAX_ROWS_OF_DIFFERENCES


def ranking(summary: Mapping[str, Any]) -> list[tuple[int | None, str]]:
    """(place, method), by test accuracy. Without a place, at the end: no test accuracy (yet), no global model."""

    def mean(method: str, metric: str) -> float:
        found = summary["methods"][method].get(metric)
        return -1.0 if found is None or found["mean"] is None else found["mean"]

    def order(method: str) -> tuple[bool, float, float]:
        return method in summary["personal"], -mean(method, "test_accuracy"), -mean(method, "client_accuracy")

    ordered = sorted(summary["methods"], key=order)
    return [
        (place if mean(method, "test_accuracy") >= 0 else None, method) for place, method in enumerate(ordered, start=1)
    ]


def header_and_rows(
    summary: Mapping[str, Any], columns: Sequence[Column] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the methods as they were given with their differences, or many methods ranked."""
    headings = [column.heading for column in columns]
    if not is_ranked(summary):
        return ["method", *headings], rows(summary, columns)
    baseline = summary["baseline"]
    header = ["", "method", headings[0], f"minus {baseline}, points", *headings[1:]]
    narrow = [columns[0], *(replace(column, interval=False) for column in columns[1:])]
    ranked = []
    for place, method in ranking(summary):
        name, accuracy, *others = _cells(summary, method, narrow)
        shown = replace(POINTS, interval=columns[0].interval)
        difference = "" if method == baseline else shown.show(summary["differences"][method].get(POINTS.metric))
        ranked.append(["–" if place is None else str(place), name, accuracy, difference, *others])
    return header, ranked


def rows(summary: Mapping[str, Any], columns: Sequence[Column]) -> list[list[str]]:
    """A row a method; with two, a row for the second minus the first."""
    signed = [replace(column, spec="+" + column.spec.lstrip("+")) for column in columns]
    differences = {} if is_ranked(summary) else summary["differences"]
    return [_cells(summary, method, columns) for method in summary["methods"]] + [
        [f"{method} − {summary['baseline']}", *(column.show(found.get(column.metric)) for column in signed)]
        for method, found in differences.items()
    ]


def _cells(summary: Mapping[str, Any], method: str, columns: Sequence[Column]) -> list[str]:
    """The method, with its seeds where some have not finished, and its numbers."""
    found = summary["methods"][method]
    done, asked = len(found["seeds"]), len(summary["seeds"])
    cells = {column.metric: column.show(found.get(column.metric)) for column in columns}
    if method in summary["personal"] and TEST_ACCURACY.metric in cells:
        cells[TEST_ACCURACY.metric] = "none"
    return [method if done == asked else f"{method} ({done} of {asked} seeds)", *cells.values()]


def table(summary: Mapping[str, Any]) -> Group:
    """The results for a terminal: of the methods, and where there are several data sets of each of these."""
    accuracy = replace(TEST_ACCURACY, interval=not is_ranked(summary))
    also = [replace(column, interval=False) for column in also_measured(summary)]
    header, cells = header_and_rows(summary, (accuracy, *also, *(COST if also else COLUMNS[1:])))
    shown = [_table(header, cells, note(summary), ends=[len(summary["methods"])])]
    header, cells = by_dataset(summary)
    if cells:
        last = [place for place, (one, other) in enumerate(pairwise(cells), start=1) if one[0] != other[0]]
        shown.append(_table(header, cells, "", last))
    return Group(*shown)


def _table(header: Sequence[str], cells: Sequence[Sequence[str]], caption: str, ends: Collection[int]) -> Table:
    """Headings are broken so that a column is as narrow as its cells; a line after the rows `ends`, from 1."""
    shown = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, caption=caption, caption_justify="left")
    for heading, column in zip(header, zip(*cells, strict=True), strict=True):
        width = max(map(len, (*heading.split(), *column)), default=1)
        shown.add_column(
            "\n".join(textwrap.wrap(heading, width)),
            justify="left" if heading in ("method", "data set") else "right",
            vertical="bottom",
            no_wrap=True,
            min_width=width,
        )
    for index, row in enumerate(cells, start=1):
        shown.add_row(*row, end_section=index in ends)
    return shown


def note(summary: Mapping[str, Any]) -> str:
    """How to read the results."""
    seeds = summary["seeds"]
    spread = "; in brackets the 95 % t-interval; differences are paired by seed" if len(seeds) > 1 else ""
    text = f"Means over seed{'s' if len(seeds) > 1 else ''} {join_words(seeds)}{spread}."
    if summary["personal"]:
        text += " No global model: each client keeps its own, and is measured with it on its own data."
    return text
