"""`copra-fl probe`: measurements on finished runs. Each command writes a page and a JSON file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import progress as rich_progress
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from copra_fl.cli.options import writable_folder
from copra_fl.config import ConfigError
from copra_fl.console import plain_console

if TYPE_CHECKING:  # slow to import
    from copra_fl.probes.findings import Findings
    from copra_fl.probes.open_run import OpenRun, Progress

app = typer.Typer(help="Measure the adapters of finished runs: lines between them, merging, layers, pruning.",
                  no_args_is_help=True)  # fmt: skip


class SplitName(StrEnum):
    SERVER_VALIDATION = "server-validation"
    TEST = "test"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.", show_default=False)
]
SplitOption = Annotated[
    SplitName, typer.Option("--split", help="Examples to evaluate on; neither is used in training.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="Folder for page and JSON file. Default: the folder of the first run.",
        callback=writable_folder,
    ),
]
RoundOption = Annotated[
    int | None, typer.Option("--round", min=1, help="Compare the clients of this round. Default: the last round.")
]
ClientsOption = Annotated[
    str, typer.Option("--clients", metavar="N,N,...", help="Compare only these clients of the round.")
]


@app.command()
def connectivity(
    runs: RunsArgument,
    round_: RoundOption = None,
    clients: ClientsOption = "",
    rounds: Annotated[
        str, typer.Option("--rounds", metavar="N,N,...", help="Compare global adapters of these rounds (0 = initial).")
    ] = "",
    points: Annotated[int, typer.Option("--points", min=3, help="Number of points on each line, ends included.")] = 21,
    max_clients: Annotated[
        int, typer.Option("--max-clients", min=2, help="Maximum number of clients, if --clients is not given.")
    ] = 6,
    triangle: Annotated[
        bool, typer.Option("--triangle/--no-triangle", help="Also evaluate the plane through the first 3 adapters.")
    ] = True,
    split: SplitOption = SplitName.SERVER_VALIDATION,
    output: OutputOption = None,
) -> None:
    """Evaluate loss and accuracy on the line between each pair of adapters.

    One RUN: the adapters of its clients in the last round or --round, or its global adapters of --rounds.
    Several RUNs: their final adapters.
    """
    numbers = parse_numbers("--clients", clients), parse_numbers("--rounds", rounds)
    with opened(runs) as opened_runs, progress_bar() as progress:
        from copra_fl.probes import connectivity as probe
        from copra_fl.probes.members import select_members

        members = select_members(opened_runs, progress, round_, *numbers, max_clients)
        findings = probe.probe(members, split.value, points, triangle, progress)
    leave(findings, output or runs[0])


@app.command()
def merge(
    runs: RunsArgument,
    round_: RoundOption = None,
    clients: ClientsOption = "",
    scale: Annotated[
        float, typer.Option("--scale", help="Task arithmetic: factor of each client's weight change.")
    ] = 0.4,
    density: Annotated[
        float, typer.Option("--density", min=0.01, max=1, help="TIES and DARE: fraction of each adapter that is kept.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="DARE: random seed for sampling.")] = 0,
    split: SplitOption = SplitName.SERVER_VALIDATION,
    output: OutputOption = None,
) -> None:
    """Merge adapters with PEFT (average, task arithmetic, TIES, DARE, SVD); evaluate before and after.

    One RUN: the adapters of its clients in the last round or --round.
    Several RUNs: their final adapters.
    """
    with opened(runs) as opened_runs, progress_bar() as progress:
        from copra_fl.probes import merge as probe
        from copra_fl.probes.members import select_members

        members = select_members(opened_runs, progress, round_, parse_numbers("--clients", clients))
        findings = probe.probe(members, split.value, scale, density, seed, progress)
    leave(findings, output or runs[0])


def parse_numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers in `text`, separated by commas. Raises ConfigError for other text."""
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of whole numbers like 0,3,4") from None


@contextmanager
def opened(directories: Sequence[Path]) -> Iterator[list[OpenRun]]:
    """Open the finished runs in `directories`. Raises ResultsError for a folder that cannot be probed."""
    from copra_fl import startup

    startup.prepare()

    warnings.simplefilter(
        "ignore", FutureWarning
    )  # Transformers warns of its own attributes, and breaks the progress bar
    from copra_fl.probes.open_run import open_runs

    with plain_console(stderr=True).status("opening the runs"):
        runs = open_runs([directory.absolute() for directory in directories])
    yield runs


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show one progress bar for each step that a probe reports (`open_run.Progress`)."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with rich_progress.Progress(*columns, console=plain_console(stderr=True), transient=True) as bar:
        tasks: dict[str, rich_progress.TaskID] = {}

        def progress(step: str, done: float, total: float) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], advance=done, total=total)

        yield progress


def leave(findings: Findings, directory: Path) -> None:
    """Print the results; write page and JSON file to `directory`."""
    from copra_fl.probes.findings import write_findings

    console = plain_console()
    console.print(replace(findings.results, title=findings.setting))
    for warning in findings.warnings:
        console.print(f"note: {warning}", soft_wrap=True)
    console.print(findings.verdict, soft_wrap=True)
    console.print(f"page: {write_findings(findings, directory.absolute())}", soft_wrap=True)
