"""`copra-fl simulate`: one federation, simulated through Flower on Ray."""

from __future__ import annotations

from contextlib import closing

from rich.console import Console

from copra_fl.cli import options
from copra_fl.config import Config
from copra_fl.simulation import preflight, progress
from copra_fl.simulation.ray_cluster import Demand
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.superlink import superlink


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
    """Simulate one federation: its clients train, Flower's server averages, on Ray workers, here or on a cluster."""
    console = Console(stderr=True)
    directory = options.choose_output(output, "simulate", resume, overwrite)
    stored = directory / "config.toml"
    if resume and stored.exists() and recipe is None and not set_:
        config = Config.from_toml(stored)
    else:
        config = Recipe.read(recipe or "base", set_ or []).config()
    with superlink(directory / "flower.log", ray_address) as link:
        (config,) = preflight.check([config], console)
        shares = Demand(workers, gpus_per_worker, ray_address).meet([config], console)
        options.make_output(directory, overwrite)
        options.write_config(directory, config)
        run_config = config.to_flat() | {"output": str(directory), "resume": resume}

        from copra_fl.trackers.feed import Tracking  # slow to import, as are those below

        with closing(Tracking(track or [], [directory], console)) as tracking:
            progress.watch(link, link.start_run(run_config, shares), 1, console, tracking.update)

    from copra_fl.reporting.report import write
    from copra_fl.reporting.tables import table

    console.print(table(write(directory)))
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    if as_json:
        print((directory / "summary.json").read_text(encoding="utf-8"))
