"""The results of a comparison on a terminal: table, verdict, warnings."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from copra_fl.records import ComparisonSummary
from copra_fl.reporting.data_table import DataTable
from copra_fl.reporting.tables import (
    COLUMNS,
    dataset_tables,
    early_ends,
    no_better_than_majority,
    optional_columns,
    results_table,
)
from copra_fl.reporting.verdict import verdict


def results(summary: ComparisonSummary, table: DataTable | None = None) -> Group:
    """Return the table of the methods, with several data sets one by data set too, verdict, warnings and early ends.

    The table is that of `COLUMNS` and of what only some tasks measure, unless there is another `table`.
    """
    table = table or results_table(summary, (*COLUMNS, *optional_columns(summary)), "MB: up and down.")
    sentences = (verdict(summary).text, *no_better_than_majority(summary), *early_ends(summary))
    return Group(table, *dataset_tables(summary), "", *map(Text, sentences))
