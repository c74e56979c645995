"""The results of a comparison on a terminal: table, verdict, warnings."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Group
from rich.text import Text

from copra_fl.records import ComparisonSummary
from copra_fl.reporting.tables import (
    COLUMNS,
    COST,
    MACRO_F1,
    TEST_ACCURACY,
    dataset_tables,
    early_ends,
    no_better_than_majority,
    optional_columns,
    results_table,
)
from copra_fl.reporting.verdict import verdict


def results(summary: ComparisonSummary) -> Group:
    """Return the table of the methods, with several data sets one by data set too, verdict, warnings and early ends."""
    optional = [replace(column, interval=False) for column in optional_columns(summary)]
    columns = (TEST_ACCURACY, *optional, MACRO_F1, *COST[::-1]) if optional else COLUMNS
    sentences = (verdict(summary), *no_better_than_majority(summary), *early_ends(summary))
    return Group(results_table(summary, columns), *dataset_tables(summary), "", *map(Text, sentences))
