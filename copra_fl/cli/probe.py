"""`copra-fl probe`: look into finished runs. Each command opens runs, measures, and leaves a page and a JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

if TYPE_CHECKING:  # slow to import
    from copra_fl.probes.opening import OpenRun, Progress
    from copra_fl.probes.page import Findings

app = typer.Typer(help="Look into finished runs: what lies between adapters, and what becomes of merged ones.",
                  no_args_is_help=True)  # fmt: skip


@app.callback()
def probe() -> None:
    """A sub-app has at least one command of its own."""


class SplitName(StrEnum):
    SERVER_VALIDATION = "server-validation"
    TEST = "test"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.", show_default=False)
]
SplitOption = Annotated[SplitName, typer.Option("--split", help="Held-out examples to score on.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Folder for page and JSON. Default: the first run's folder.")
]
RoundOption = Annotated[
    int | None, typer.Option("--round", min=1, help="Whose clients to look at. Default: the last round.")
]


@contextmanager
def opened(directories: Sequence[Path]) -> Iterator[list[OpenRun]]:
    """The runs in `directories`; inside and while opening, what cannot be probed ends in a message for people."""
    import copra_fl.process  # noqa: F401
    from copra_fl.probes.opening import open_runs
    from copra_fl.results import ResultsError

    try:
        with Console(stderr=True).status("opening"):
            runs = open_runs([directory.absolute() for directory in directories])
        yield runs
    except ResultsError as error:
        typer.echo(f"copra-fl: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar for each thing that a probe says it does (`opening.Progress`)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, rich_progress.TaskID] = {}

        def progress(what: str, done: float, of: float) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], advance=done, total=of)

        yield progress


def leave(findings: Findings, directory: Path) -> None:
    """Print the results, write page and JSON to `directory`."""
    from copra_fl.probes.page import write

    columns = [Column(name, justify="right" if i else "left") for i, name in enumerate(findings.results.header)]
    table = Table(*columns, title=findings.setting, caption=findings.results.caption)
    for row in findings.results.rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for warning in findings.warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True)
    console.print(findings.verdict, highlight=False, soft_wrap=True)
    console.print(f"page: {write(findings, directory.absolute())}", soft_wrap=True)
