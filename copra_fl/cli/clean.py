"""`copra-fl clean`: remove what is left of old runs, of data that is gone, and of killed processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from copra_fl.console import plain_console
from copra_fl.files import cache_dir


def clean(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN...]",
            help="Folders of runs, comparisons or studies: of their finished runs, also remove the checkpoints except "
            "the newest --keep.",
            show_default=False,
        ),
    ] = None,
    days: Annotated[
        float,
        typer.Option(
            "--days",
            min=0,
            help="Remove clients' states, and tables and models from Python, that were not used for this many days.",
        ),
    ] = 30,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Newest checkpoints of each run that stay.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List everything with its size, and remove nothing.")
    ] = False,
) -> None:
    """Remove old states of clients, old tables and models from Python, tokens of data that is gone, damaged tokens and
    unfinished downloads from the cache.
    """
    from copra_fl.data.leftovers import in_cache, in_runs  # slow to import

    leftovers = [*in_cache(cache_dir(), days), *in_runs(runs or [], keep)]
    sizes = [leftover.num_bytes for leftover in leftovers]
    table = Table(Column("path", overflow="fold"), Column("MB", justify="right"), Column("reason", overflow="fold"))
    for leftover, size in zip(leftovers, sizes, strict=True):
        table.add_row(str(leftover.path), f"{size / 1e6:.2f}", leftover.reason)
        if not dry_run:
            leftover.remove()
    console = plain_console()
    if leftovers:
        console.print(table)
    action = "can be removed" if dry_run else "removed"
    console.print(f"{len(leftovers)} files and folders {action}: {sum(sizes) / 1e6:.2f} MB")
