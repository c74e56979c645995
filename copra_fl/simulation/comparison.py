"""A comparison: every method with every seed, run one after the other by one Flower app."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from copra_fl.config import Config, ConfigError, read_toml
from copra_fl.files import atomic_write
from copra_fl.simulation import preflight, progress
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe, built_in_methods, method_settings
from copra_fl.simulation.run_folder import check_unchanged, delete_content, held, write_config
from copra_fl.simulation.superlink import superlink
from copra_fl.wording import listed

#: methods and seeds of a comparison, and the configuration of each run by the names of `run_names`
Plan = tuple[list[str], list[int], dict[str, Config]]
#: methods and seeds of a comparison that names none; the configurations follow from a recipe
DEFAULT_PLAN: Plan = (["lora", "copra"], [0, 1, 2], {})


def run_comparison(
    directory: Path,
    methods: list[str],
    seeds: list[int],
    configs: Mapping[str, Config],
    console: Console,
    request: WorkerRequest,
    overwrite: bool = False,
    track: Sequence[str] = (),
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Run or continue the comparison in `directory`; finished runs are not repeated.

    `on_progress` is called after each round and each run.

    `configs` has the configuration of each run, by the names of `run_names`.
    Raises ConfigError for a configuration that cannot run or differs from the one of an unfinished run, and while a run
    is writing to `directory`; and RunFailed.
    """
    with superlink(directory / "flower.log", configs.values(), request.ray_address) as link:
        configs = dict(zip(configs, preflight.check(configs.values(), console, request), strict=True))
        workers = request.allocate(list(configs.values()), console)
        with held(directory):
            if overwrite:
                delete_content(directory)
            write_plan(directory, methods, seeds, configs)
        with console.status("starting Flower"):
            process = link.start_run({"output": str(directory), "resume": True}, workers)
        progress.watch_tracked(link, process, [directory / name for name in configs], console, track, on_progress)


def write_plan(directory: Path, methods: list[str], seeds: list[int], configs: Mapping[str, Config]) -> None:
    """Write each run's configuration, and ``comparison.toml``: the runs for the server and the report.

    Raises ConfigError for a run in `directory` with another configuration, and writes nothing then.
    """
    for name, config in configs.items():
        check_unchanged(directory / name, config)
    for name, config in configs.items():
        write_config(directory / name, config)
    plan = f"methods = {json.dumps(methods)}\nseeds = {seeds}\n"
    atomic_write(directory / "comparison.toml", plan)


def find_plan(directory: Path) -> Plan | None:
    """Return `load_plan(directory)`; None if the folder holds no comparison."""
    return load_plan(directory) if (directory / "comparison.toml").exists() else None


def load_plan(directory: Path) -> Plan:
    """Return the plan of the comparison that `directory` holds."""
    plan = read_toml(directory / "comparison.toml")
    names = run_names(plan["methods"], plan["seeds"])
    return plan["methods"], plan["seeds"], {name: Config.from_toml(directory / name / "config.toml") for name in names}


def run_names(methods: Iterable[str], seeds: Iterable[int]) -> dict[str, tuple[str, int]]:
    """Return folder name -> method and seed of each run, in the order in which the server runs them."""
    return {f"{method}-seed{seed}": (method, seed) for seed in seeds for method in methods}


def refuse_dropped(directory: Path, earlier: Plan | None, runs: Container[str]) -> None:
    """Raise ConfigError unless `runs` has all runs of the plan `earlier` that have begun."""
    _, _, before = earlier or DEFAULT_PLAN
    if dropped := [name for name in before if name not in runs and (directory / name / "journal.jsonl").exists()]:
        raise ConfigError(
            f"the comparison in {directory} would lose {listed(dropped)}; name the methods and seeds of these runs "
            "too, or choose another folder"
        )


def refuse_equal(runs: Mapping[str, tuple[str, int]], configs: Mapping[str, Config]) -> None:
    """Raise ConfigError for two methods with the same configuration, as one has if a setting of all runs replaces its.

    `runs` is the result of `run_names`.
    """
    first: dict[Config, str] = {}
    for name, (method, _) in runs.items():
        if (other := first.setdefault(configs[name], method)) != method:
            raise ConfigError(
                f"methods {other!r} and {method!r} have the same settings here, so their runs would be the same; leave "
                "one out, or leave out the setting that replaces theirs"
            )


def expand_all(methods: Mapping[str, str], recipe: Recipe, console: Console) -> dict[str, str]:
    """Return `methods` (short name -> name or file) with the method ``all`` replaced by every built-in method."""
    expanded: dict[str, str] = {}
    for name, source in methods.items():
        expanded |= all_methods(recipe, console) if name == "all" else {name: source}
    return expanded


def all_methods(recipe: Recipe, console: Console) -> dict[str, str]:
    """Return every built-in method, FedAvg first, and every aggregation rule with CopRA too.

    Of methods with equal configurations only the first is returned. Methods that the recipe's settings exclude are
    left out with a note on `console`. Raises ConfigError if no method is left.
    """
    from copra_fl import startup

    startup.prepare()
    from copra_fl.aggregation import compatibility
    from copra_fl.tasks import find_task

    methods: dict[Config, str] = {}
    left_out = {}
    for name in sorted(built_in_methods(), key=lambda name: (name != "fedavg", name)):
        for method in (name, f"{name}+copra") if "rule" in method_settings(name) else (name,):
            config = recipe.config(method)
            try:
                compatibility.check(config, find_task(config.model.task))
            except ConfigError as error:
                left_out[method] = str(error)
            else:
                methods.setdefault(config, method)
    if not methods:
        raise ConfigError("\n".join(dict.fromkeys(left_out.values())))
    for method, reason in left_out.items():
        console.print(f"note: {method} is left out: {reason}", soft_wrap=True)
    return {method: method for method in methods.values()}
