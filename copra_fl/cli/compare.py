"""`copra-fl compare`: several methods over several seeds, one Flower run, one report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from copra_fl.cli import options
from copra_fl.config import Config, ConfigError, read_toml
from copra_fl.simulation import preflight, progress
from copra_fl.simulation.ray_cluster import Demand
from copra_fl.simulation.recipes import Recipe, carried_methods, method_settings, short_name
from copra_fl.simulation.superlink import superlink


def compare(
    recipe: options.RecipeOption = None,
    set_: options.SetOption = None,
    methods: options.MethodsOption = "lora,copra",
    seeds: options.SeedsOption = "0,1",
    output: options.OutputOption = None,
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusOption = None,
    ray_address: options.RayAddressOption = None,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    track: options.TrackOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compare methods seed by seed, with one Flower run; ends in a table, summary.json and report.html."""
    console = Console(stderr=True)
    directory = options.choose_output(output, "compare", resume, overwrite)
    plan = directory / "comparison.toml"
    if resume and plan.exists() and recipe is None and not set_:
        stored = read_toml(plan)
        names, numbers = {name: name for name in stored["methods"]}, stored["seeds"]
        configs = {name: Config.from_toml(directory / name / "config.toml") for name in run_names(names, numbers)}
    else:
        settings, numbers = Recipe.read(recipe or "base", set_ or []), parse_seeds(seeds)
        names = with_all(parse_methods(methods), settings, console)
        configs = {
            name: settings.config(names[method], seed) for name, (method, seed) in run_names(names, numbers).items()
        }
    demand = Demand(workers, gpus_per_worker, ray_address)
    run_comparison(directory, list(names), numbers, configs, console, demand, overwrite, track or [])

    from copra_fl.reporting.report import write  # slow to import, and not needed before
    from copra_fl.reporting.tables import table

    summary = write(directory)
    console.print(table(summary))
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
    if as_json:
        print(summary.to_json(indent=2))


def run_comparison(
    directory: Path,
    methods: list[str],
    seeds: list[int],
    configs: Mapping[str, Config],
    console: Console,
    demand: Demand,
    overwrite: bool = False,
    track: Sequence[str] = (),
) -> None:
    """Run the comparison of `configs` (by the names of `run_names`) in `directory`, from where it stands.

    Raises ConfigError for a configuration that cannot run or is not the one that a run was begun with, RunFailed.
    """
    with superlink(directory / "flower.log", demand.ray_address) as link:
        configs = dict(zip(configs, preflight.check(configs.values(), console), strict=True))
        shares = demand.meet(list(configs.values()), console)
        options.make_output(directory, overwrite)
        for name, config in configs.items():
            options.write_config(directory / name, config)
        write_plan(directory, methods, seeds)
        process = link.start_run({"output": str(directory), "resume": True}, shares)

        from copra_fl.trackers.feed import Tracking  # slow to import

        with closing(Tracking(track, [directory / name for name in configs], console)) as tracking:
            progress.watch(link, process, len(configs), console, tracking.update)


def write_plan(directory: Path, methods: list[str], seeds: list[int]) -> None:
    """Write ``comparison.toml``: what the server goes through, and what a report is of."""
    plan = f"methods = {json.dumps(methods)}\nseeds = {seeds}\n"
    (directory / "comparison.toml").write_text(plan, encoding="utf-8")


def run_names(methods: Iterable[str], seeds: Iterable[int]) -> dict[str, tuple[str, int]]:
    """Folder name of each run, with its method and seed; seed by seed, as the server goes through them."""
    return {f"{method}-seed{seed}": (method, seed) for seed in seeds for method in methods}


def parse_methods(text: str) -> dict[str, str]:
    """Each method's short name, with the name or file it was given as. Raises ConfigError for one named twice."""
    given = [name.strip() for name in text.split(",")]
    names = {short_name(name): name for name in given}
    if len(names) < len(given):
        raise ConfigError(f"--methods {text!r} names a method twice")
    return names


def with_all(names: dict[str, str], recipe: Recipe, console: Console) -> dict[str, str]:
    """`names`, with every method that comes along in place of the name ``all``."""
    expanded: dict[str, str] = {}
    for name, given in names.items():
        expanded |= all_methods(recipe, console) if name == "all" else {name: given}
    return expanded


def all_methods(recipe: Recipe, console: Console) -> dict[str, str]:
    """Every method that comes along, FedAvg first, and every rule with CopRA too; of those that are equal the first.

    What does not combine is left out with a note. Raises ConfigError where nothing is left.
    """
    from copra_fl import startup

    startup.prepare()
    from copra_fl import tasks
    from copra_fl.aggregation import check

    methods: dict[Config, str] = {}
    left_out = {}
    for name in sorted(carried_methods(), key=lambda name: (name != "fedavg", name)):
        for method in (name, f"{name}+copra") if "rule" in method_settings(name) else (name,):
            config = recipe.config(method)
            try:
                check(config)
                tasks.check(config)
            except ConfigError as error:
                left_out[method] = str(error)
            else:
                methods.setdefault(config, method)
    if not methods:
        raise ConfigError("\n".join(dict.fromkeys(left_out.values())))
    for method, reason in left_out.items():
        console.print(f"note: {method} is left out: {reason}", highlight=False, soft_wrap=True)
    return {method: method for method in methods.values()}


def parse_seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers. Raises ConfigError for anything else."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not a list of whole numbers like 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r} names a seed twice")
    return seeds
