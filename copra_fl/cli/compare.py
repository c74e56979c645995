"""`copra-fl compare`: several methods over several seeds, one Flower run, one report."""

from __future__ import annotations

import os
import time

from rich.console import Console

from copra_fl import startup
from copra_fl.cli import options
from copra_fl.cli.report import show_results
from copra_fl.config import ConfigError
from copra_fl.console import plain_console
from copra_fl.simulation.comparison import (
    DEFAULT_PLAN,
    Plan,
    expand_all,
    find_plan,
    refuse_dropped,
    refuse_equal,
    run_comparison,
    run_names,
)
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe, built_in_methods, by_short_name, refuse_idle
from copra_fl.simulation.run_folder import choose_output


def compare(
    recipe: options.RecipeOption = None,
    set_: options.SetOption = None,
    methods: options.MethodsOption = None,
    seeds: options.SeedsOption = None,
    output: options.OutputOption = None,
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusOption = None,
    ray_address: options.RayAddressOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    track: options.TrackOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods, paired by seed; write a table, summary.json and report.html."""
    console, started = plain_console(stderr=True), time.monotonic()
    directory = choose_output(output, "compare", resume, overwrite)
    earlier = find_plan(directory) if resume else None
    method_names, seed_numbers, configs = plan(earlier, recipe, set_ or [], methods, seeds, console)
    refuse_dropped(directory, earlier, configs)
    os.environ |= startup.environment(configs.values())  # for this process too
    request = WorkerRequest(workers, gpus_per_worker, ray_address)
    run_comparison(directory, method_names, seed_numbers, configs, console, request, overwrite, track or [])
    show_results(directory, console, as_json, started)


def plan(
    earlier: Plan | None, recipe: str | None, set_: list[str], methods: str | None, seeds: str | None, console: Console
) -> Plan:
    """Return what to run: the comparison `earlier`, the one to be resumed, as far as no option says otherwise.

    Raises ConfigError for options that cannot be used.
    """
    if earlier and recipe is None and not (set_ or methods or seeds):
        return earlier
    default_methods, default_seeds, _ = earlier or DEFAULT_PLAN
    settings, seed_numbers = Recipe.read(recipe or "base", set_), parse_seeds(seeds) if seeds else default_seeds
    settings.refuse_override("seed", "use --seeds, as in --seeds 0,1,2")
    sources = expand_all(parse_methods(methods or ",".join(default_methods)), settings, console)
    runs = run_names(sources, seed_numbers)
    configs = {name: settings.config(sources[method], seed) for name, (method, seed) in runs.items()}
    refuse_equal(runs, configs)
    refuse_idle(settings.overrides, configs.values())
    used = {name for method in sources for name in method.split("+")}
    used |= {config.copra.local_training for config in configs.values()}
    for name in sorted(settings.methods.keys() - used - built_in_methods().keys()):
        console.print(f"note: no method of this comparison has the settings of the recipe's table [methods.{name}]")
    return list(sources), seed_numbers, configs


def parse_methods(text: str) -> dict[str, str]:
    """Return short name -> name or file of each method in `text`. Raises ConfigError for a repeated method."""
    return by_short_name(name.strip() for name in text.split(","))


def parse_seeds(text: str) -> list[int]:
    """Return the seeds in ``0,1,2``. Raises ConfigError for other text and for a repeated seed."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not a list of whole numbers like 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r} names a seed twice")
    return seeds
