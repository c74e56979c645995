"""A simulation of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from copra_fl.config import Config
from copra_fl.simulation import preflight, progress
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.run_folder import delete_content, held, write_config
from copra_fl.simulation.superlink import superlink


def choose_config(directory: Path, recipe: Recipe, continues: bool) -> Config:
    """Return the configuration of a run in `directory`: that of `recipe`.

    If the run `continues` without naming a recipe, it is the stored configuration with the overrides of `recipe`.
    """
    stored = directory / "config.toml"
    if continues and stored.exists():
        return Config.from_flat(Config.from_toml(stored).to_flat() | recipe.overrides)
    return recipe.config()


def run_single(
    directory: Path,
    config: Config,
    console: Console,
    request: WorkerRequest,
    resume: bool = False,
    overwrite: bool = False,
    track: Sequence[str] = (),
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Run or continue the run in `directory`. `on_progress` is called after each round and at the end.

    Raises ConfigError for a configuration that cannot run or differs from the one of an unfinished run, and while a run
    is writing to `directory`; and RunFailed.
    """
    with superlink(directory / "flower.log", [config], request.ray_address) as link:
        (config,) = preflight.check([config], console, request)
        workers = request.allocate([config], console)
        with held(directory):
            if overwrite:
                delete_content(directory)
            write_config(directory, config, lengthen=resume)
        with console.status("starting Flower"):
            process = link.start_run(config.to_run_config() | {"output": str(directory), "resume": resume}, workers)
        progress.watch_tracked(link, process, [directory], console, track, on_progress)
