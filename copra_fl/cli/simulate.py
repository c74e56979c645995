"""`copra-fl simulate`: one federation, simulated through Flower on Ray."""

from __future__ import annotations

import os
import time

from copra_fl import startup
from copra_fl.cli import options
from copra_fl.cli.report import show_results
from copra_fl.console import plain_console
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe, refuse_idle
from copra_fl.simulation.run_folder import choose_output
from copra_fl.simulation.single_run import choose_config, run_single


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
    console, started = plain_console(stderr=True), time.monotonic()
    directory = choose_output(output, "simulate", resume, overwrite)
    chosen = Recipe.read(recipe or "base", set_ or [])
    config = choose_config(directory, chosen, continues=resume and recipe is None)
    refuse_idle(chosen.overrides, [config])
    os.environ |= startup.environment([config])  # for this process too
    request = WorkerRequest(workers, gpus_per_worker, ray_address)
    run_single(directory, config, console, request, resume, overwrite, track or [])
    show_results(directory, console, as_json, started)
