"""`copra-fl simulate`: one federation, simulated through Flower on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

from rich.console import Console

from copra_fl import startup
from copra_fl.cli import options
from copra_fl.cli.report import show_results
from copra_fl.config import Config, ConfigError
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.run_folder import choose_output
from copra_fl.simulation.single_run import choose_config, run_single

#: keys that only CopRA reads
SCHEDULE_KEYS = ("p0", "p1", "ramp", "off", "min-active", "schedule-progress", "mask-scope", "rescale")


def simulate(
    recipe: options.RecipeOption = None,
    set_: options.SetOption = None,
    output: options.OutputOption = None,
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusOption = None,
    ray_address: options.RayAddressOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    track: options.TrackOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Simulate one federation with Flower on Ray, on this machine or a Ray cluster; write adapter and report."""
    console, started = Console(stderr=True), time.monotonic()
    directory = choose_output(output, "simulate", resume, overwrite)
    chosen = Recipe.read(recipe or "base", set_ or [])
    config = choose_config(directory, chosen, continues=resume and recipe is None)
    refuse_idle_schedule(config, chosen.overrides)
    os.environ |= startup.environment([config])  # for this process too
    request = WorkerRequest(workers, gpus_per_worker, ray_address)
    run_single(directory, config, console, request, resume, overwrite, track or [])
    show_results(directory, console, as_json, started)


def refuse_idle_schedule(config: Config, overrides: Collection[str]) -> None:
    """Raise ConfigError if ``--set`` sets a key of CopRA's schedule for a run that trains otherwise."""
    idle = [key for key in SCHEDULE_KEYS if key in overrides]
    training = config.copra.local_training
    if idle and training != "copra":
        raise ConfigError(
            f"--set {idle[0]}={config.to_flat()[idle[0]]} has no effect with local-training = {training!r}; add "
            "--set local-training=copra"
        )
