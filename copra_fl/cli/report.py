"""`copra-fl report DIR`: read a run or a comparison again and write its report anew."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copra_fl.cli.options import writable_folder
from copra_fl.console import plain_console
from copra_fl.provenance import pip_install
from copra_fl.simulation.superlink import RunFailed


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run or comparison.", show_default=False)
    ],
    all_columns: Annotated[
        bool,
        typer.Option(
            "--all-columns",
            help="Print every column of the report's table of results: also macro-F1, client accuracy, errors of the "
            "aggregation, bytes up and down.",
        ),
    ] = False,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            metavar="FOLDER",
            callback=writable_folder,
            help="Also write every chart (SVG, PNG, CSV) and table (CSV, Markdown, LaTeX) to this folder. SVG and PNG "
            "need the extra `figures` and Chromium; the buttons in the page need neither.",
        ),
    ] = None,
) -> None:
    """Write report.html in DIR anew, and summary.json if DIR is a comparison; print the results."""
    show_results(directory, plain_console(), all_columns=all_columns)
    if figures:
        export(directory, figures)


def export(directory: Path, folder: Path) -> None:
    """Write charts and tables of the run or comparison in `directory` to `folder`. Raises RunFailed without images."""
    from copra_fl.reporting.export import NoImages, write_files  # slow to import
    from copra_fl.reporting.report import figures_and_tables

    console = plain_console()
    try:
        write_files(folder, *figures_and_tables(directory))
    except NoImages as reason:
        raise RunFailed(
            f"tables and data are in {folder}, but no SVG and PNG: {reason}. The buttons under the charts of "
            f"{directory / 'report.html'} save both; or install Chromium and {pip_install('figures')}"
        ) from None
    console.print(f"charts and tables: {folder}", soft_wrap=True)


def show_results(
    directory: Path,
    console: Console,
    as_json: bool = False,
    started: float | None = None,
    all_columns: bool = False,
) -> None:
    """Write the report of a run or comparison, print its table and the paths of adapter and report.

    The table has the columns by which a user decides, or `all_columns`. With `as_json`, print summary.json on standard
    output too. With `started`, the monotonic time at which the command started, print the seconds of the rounds and of
    the whole command. Raises ResultsError and ConfigError.
    """
    from copra_fl.reporting.report import all_results, write  # slow to import
    from copra_fl.reporting.terminal import results

    summary = write(directory)
    console.print(results(summary, all_results(summary) if all_columns else None))
    if started is not None:
        rounds = sum(value or 0 for estimates in summary.methods.values() for value in estimates.get("seconds").values)
        whole = time.monotonic() - started
        console.print(f"time: {rounds:.0f} s in rounds, {whole:.0f} s for the whole command")
    if (directory / "adapter").exists():
        console.print(f"adapter: {directory / 'adapter'}", soft_wrap=True)
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    if not all_columns:
        console.print(f"all columns: copra-fl report {directory} --all-columns", soft_wrap=True)
    if as_json:
        print((directory / "summary.json").read_text(encoding="utf-8"))
