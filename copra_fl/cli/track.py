"""`copra-fl track DIR`: send a finished run or comparison to a tracker."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from copra_fl import trackers
from copra_fl.console import plain_console


def track(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run or comparison.", show_default=False)
    ],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="TRACKER",
            help="Tracker: tensorboard, mlflow, wandb or a plugin. May be repeated.",
            callback=trackers.checked,
            show_default=False,
        ),
    ],
) -> None:
    """Send the journal and results of DIR to a tracker, as `--track` does during a run."""
    from copra_fl.reporting.results import load_comparison  # slow to import
    from copra_fl.trackers.feed import Tracking

    runs = [run.directory for _, run in load_comparison(directory.absolute()).runs]
    with closing(Tracking(to, runs, plain_console(stderr=True))) as tracking:
        tracking.update()
