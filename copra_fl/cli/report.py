"""`copra-fl report DIR`: read a run or a comparison again and write its report anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run or comparison.", show_default=False)
    ],
) -> None:
    """Write report.html in DIR anew, and summary.json if DIR is a comparison; print the results."""
    show_results(directory, Console())


def show_results(directory: Path, console: Console, as_json: bool = False) -> None:
    """Write the report of a run or comparison, print its table and the paths of adapter and report.

    With `as_json`, print summary.json on standard output too. Raises ResultsError and ConfigError.
    """
    from copra_fl.reporting.report import write  # slow to import
    from copra_fl.reporting.terminal import results

    console.print(results(write(directory)), highlight=False)
    if (directory / "adapter").exists():
        console.print(f"adapter: {directory / 'adapter'}", soft_wrap=True)
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    if as_json:
        print((directory / "summary.json").read_text(encoding="utf-8"))
