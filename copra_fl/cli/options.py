"""The options that `simulate`, `compare` and `deploy run` share."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from copra_fl import trackers
from copra_fl.config import Config, ConfigError
from copra_fl.simulation import ray_cluster
from copra_fl.simulation.recipes import carried_recipes

RECIPE_HELP = f"Recipe: a TOML file, or the name of a built-in recipe ({', '.join(carried_recipes())})."
RecipeOption = Annotated[str | None, typer.Option("--recipe", help=RECIPE_HELP)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a configuration key; wins over all.")
]
MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        help="Comma-separated: names in experiments/methods or TOML files; flora+copra: one over the other; all.",
    ),
]
SeedsOption = Annotated[str, typer.Option("--seeds", help="Comma-separated root seeds; every method runs with each.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Folder for the results. Default: below runs/.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Ray workers. Default: one per core, 4.")]
GpusOption = Annotated[
    float | None, typer.Option("--gpus-per-worker", min=0, help="Share of a GPU for each worker. Default: all, evenly.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Run on this Ray cluster, of which this machine is one. Default: a Ray of its own, on this machine.",
        callback=ray_cluster.reachable,
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where a stopped run in --output left off.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Throw away an earlier run in --output.")]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="tensorboard, mlflow or wandb, fed as the run goes; repeatable.",
        callback=trackers.checked,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")]

#: what a run or comparison folder has at its top, and no other folder is taken for one
MARKS = ("comparison.toml", "config.toml")


def choose_output(output: Path | None, command: str, resume: bool, overwrite: bool) -> Path:
    """The folder for the results; nothing is made or thrown away yet.

    Raises ConfigError for a folder with content, unless the run in it is to be resumed or thrown away.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other: go on with the run, or throw it away?")
    directory = (output or Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--output {directory} is a file, not a folder")
    if directory.exists() and any(directory.iterdir()):
        is_run = any((directory / mark).exists() for mark in MARKS)
        if not is_run or not (resume or overwrite):
            hint = "--resume goes on with it, --overwrite throws it away" if is_run else "it is not a run of copra-fl"
            raise ConfigError(f"--output {directory} exists and is not empty: {hint}")
    return directory


def make_output(directory: Path, overwrite: bool) -> None:
    """Make what `choose_output` chose, once everything is known to be right."""
    if overwrite and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)


def write_config(directory: Path, config: Config) -> None:
    """Write the run's ``config.toml``. Raises ConfigError where the folder has another one, naming the keys."""
    path = directory / "config.toml"
    if path.exists() and (changed := Config.from_toml(path).differences(config)):
        raise ConfigError(f"cannot resume {directory} with a changed configuration: {'; '.join(changed)}")
    directory.mkdir(exist_ok=True)
    path.write_text(config.to_toml(), encoding="utf-8")
