"""`copra-fl probe`: look into finished runs. Each command opens runs, measures, and leaves a page and a JSON file."""

from __future__ import annotations

import warnings
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

from copra_fl.config import ConfigError

if TYPE_CHECKING:  # slow to import
    from copra_fl.probes.findings import Findings
    from copra_fl.probes.open_run import OpenRun, Progress

app = typer.Typer(help="Look into finished runs: what lies between adapters, and what becomes of merged ones.",
                  no_args_is_help=True)  # fmt: skip


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
ClientsOption = Annotated[str, typer.Option("--clients", metavar="N,N,...", help="Which clients of the round.")]


@app.command()
def connectivity(
    runs: RunsArgument,
    round_: RoundOption = None,
    clients: ClientsOption = "",
    rounds: Annotated[
        str, typer.Option("--rounds", metavar="N,N,...", help="Global adapters of these rounds, 0 the start.")
    ] = "",
    points: Annotated[int, typer.Option("--points", min=3, help="Points on a line.")] = 21,
    most: Annotated[int, typer.Option("--most", min=2, help="Without --clients, the first so many.")] = 6,
    triangle: Annotated[bool, typer.Option("--triangle/--no-triangle", help="The plane through the first 3.")] = True,
    split: SplitOption = SplitName.SERVER_VALIDATION,
    output: OutputOption = None,
) -> None:
    """Loss and accuracy on the line between each pair: clients of a round, rounds of a run, or several runs.

    One RUN: its clients of the last or of --round, or its global adapters of --rounds. Several: their final adapters.
    """
    numbers = parse_numbers("--clients", clients), parse_numbers("--rounds", rounds)
    with opened(runs) as opened_runs, progress_bar() as progress:
        from copra_fl.probes import connectivity as probe
        from copra_fl.probes.members import select_members

        members = select_members(opened_runs, progress, round_, *numbers, most)
        findings = probe.probe(members, split.value, points, triangle, progress)
    leave(findings, output or runs[0])


@app.command()
def merge(
    runs: RunsArgument,
    round_: RoundOption = None,
    clients: ClientsOption = "",
    scale: Annotated[float, typer.Option("--scale", help="Task arithmetic: what each product is multiplied by.")] = 0.4,
    density: Annotated[
        float, typer.Option("--density", min=0.01, max=1, help="TIES and DARE: what is kept of each adapter.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="What DARE draws from.")] = 0,
    split: SplitOption = SplitName.SERVER_VALIDATION,
    output: OutputOption = None,
) -> None:
    """Merge adapters with PEFT: average, task arithmetic, TIES, DARE, SVD; accuracy before and after.

    One RUN: its clients of the last or of --round. Several: their final adapters.
    """
    with opened(runs) as opened_runs, progress_bar() as progress:
        from copra_fl.probes import merge as probe
        from copra_fl.probes.members import select_members

        members = select_members(opened_runs, progress, round_, parse_numbers("--clients", clients))
        findings = probe.probe(members, split.value, scale, density, seed, progress)
    leave(findings, output or runs[0])


def parse_numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between them. Raises ConfigError for anything else."""
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of whole numbers like 0,3,4") from None


@contextmanager
def opened(directories: Sequence[Path]) -> Iterator[list[OpenRun]]:
    """The runs in `directories`; inside and while opening, what cannot be probed ends in a message for people."""
    import copra_fl.startup  # noqa: F401

    warnings.simplefilter("ignore", FutureWarning)  # Transformers of its own attributes, and it tears the progress bar
    from copra_fl.probes.open_run import open_runs
    from copra_fl.reporting.results import ResultsError

    try:
        with Console(stderr=True).status("opening"):
            runs = open_runs([directory.absolute() for directory in directories])
        yield runs
    except ResultsError as error:
        typer.echo(f"copra-fl: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar for each thing that a probe says it does (`open_run.Progress`)."""
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
    from copra_fl.probes.findings import write_findings

    columns = [Column(name, justify="right" if i else "left") for i, name in enumerate(findings.results.header)]
    table = Table(*columns, title=findings.setting, caption=findings.results.caption)
    for row in findings.results.rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for warning in findings.warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True)
    console.print(findings.verdict, highlight=False, soft_wrap=True)
    console.print(f"page: {write_findings(findings, directory.absolute())}", soft_wrap=True)
