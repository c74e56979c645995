"""``copra-fl report DIR``: read a run or a comparison again and write its report anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copra_fl.config import ConfigError


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="folder of a run or of a comparison")],
) -> None:
    """Rebuild report.html in DIR, and summary.json where DIR is a comparison."""
    from copra_fl.reporting.report import write  # slow to import
    from copra_fl.reporting.results import ResultsError
    from copra_fl.reporting.tables import table

    try:
        summary = write(directory)
    except (ResultsError, ConfigError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None
    Console().print(table(summary))
    typer.echo(directory / "report.html")
