"""`copra-fl study`: a grid of methods, seeds, learning rates, splits and regimes, as one comparison after the other.

A study is a recipe with a table ``[study]``:

    [study.splits.NAME]    settings: who has which data, and which clients take part
    [study.regimes.NAME]   settings: rounds and local steps
    [study.tuning]         seeds, learning-rates, and settings of the runs that choose a rate
    [study.grids.NAME]     methods, seeds, splits, regimes

In each cell of a grid (a split in a regime) every method's learning rate is chosen on validation data of the tuning
seeds; then the method runs at that rate with the grid's seeds. What has finished is not run again, so the same command
goes on after a kill, and after seeds, methods or cells were added.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from copra_fl.cli import options
from copra_fl.cli.compare import run_comparison, run_names, write_plan
from copra_fl.config import Config, ConfigError, flatten
from copra_fl.simulation import preflight
from copra_fl.simulation.ray_cluster import Demand
from copra_fl.simulation.recipes import Recipe, short_name
from copra_fl.wording import unknown_name

TUNING_KEYS = ("seeds", "learning-rates", "settings")
ConfigOfSeed = Callable[[int], Config]
GRID_KEYS = ("methods", "seeds", "splits", "regimes")

GridsOption = Annotated[
    str | None, typer.Option("--grids", help="Comma-separated grids of the file. Default: all, in their order.")
]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder for the results; an earlier study there goes on.")]
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="Study TOML, or `study`, which comes along.")]


@dataclass(frozen=True)
class Cell:
    """A split in a regime: its folder, what is compared there, and how rates are chosen."""

    directory: Path
    recipe: Recipe
    methods: Mapping[str, str]  # short name -> name or file
    seeds: list[int]
    tuning: Mapping[str, Any]

    def config(self, method: str, rate: float, seed: int) -> Config:
        """A run of `method` at a learning rate."""
        from copra_fl.reporting.study import rate_key

        config = self.recipe.config(self.methods[method], seed)
        return Config.from_flat(config.to_flat() | {rate_key(config): rate})

    def tuning_config(self, method: str, rate: float, seed: int) -> Config:
        """The same, as one of the runs that a rate is chosen by."""
        return Config.from_flat(self.config(method, rate, seed).to_flat() | self.tuning["settings"])


def study(
    file: FileArgument,
    grids: GridsOption = None,
    set_: options.SetOption = None,
    output: OutputOption = Path("runs/study"),
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusOption = None,
    ray_address: options.RayAddressOption = None,
) -> None:
    """Run a study, or go on with it: every method at its best learning rate, in several splits and regimes."""
    console = Console(stderr=True)
    recipe, demand = Recipe.read(file, set_ or []), Demand(workers, gpus_per_worker, ray_address)
    planned = {name: list(cells) for name, cells in read_grids(recipe, grids, output.absolute())}
    preflight.check([config for cells in planned.values() for cell in cells for config in samples(cell)], console)

    from copra_fl.reporting.results import load_comparison
    from copra_fl.reporting.statistics import summarize
    from copra_fl.reporting.study import TEST, write
    from copra_fl.reporting.tables import table  # slow to import

    def run(directory: Path, seeds: list[int], methods: Mapping[str, ConfigOfSeed]) -> None:
        """Run the comparison of `methods`; one that has finished is only told apart from what else is in its folder."""
        configs = {name: methods[method](seed) for name, (method, seed) in run_names(methods, seeds).items()}
        if all((directory / name / "summary.json").exists() for name in configs):
            write_plan(directory, list(methods), seeds)
        else:
            run_comparison(directory, list(methods), seeds, configs, console, demand)

    for name, cells in planned.items():
        for number, cell in enumerate(cells, start=1):
            console.rule(f"{name} {number}/{len(cells)}: {cell.directory.parent.name}, {cell.directory.name}")
            rates = tune(cell, run)
            console.print(", ".join(f"{method}: {rate:g}" for method, rate in rates.items()))
            tested = {method: functools.partial(cell.config, method, rate) for method, rate in rates.items()}
            run(cell.directory / TEST, cell.seeds, tested)
            console.print(table(summarize(load_comparison(cell.directory / TEST))))
        directory = output.absolute() / name
        write(directory, [cell.directory for cell in cells], shlex.join(["copra-fl", *sys.argv[1:]]))
        console.print(f"report: {directory / 'report.html'}, numbers: {directory / 'results.json'}", soft_wrap=True)


def tune(cell: Cell, run: Callable[[Path, list[int], Mapping[str, ConfigOfSeed]], None]) -> dict[str, float]:
    """The learning rate of each method, found by running what `copra_fl.reporting.study.rates_to_try` asks for."""
    from copra_fl.reporting.results import load_comparison
    from copra_fl.reporting.study import RATES, best_rate, rates_to_try, tuned_name, validation_accuracies

    grid, tried = cell.tuning["learning-rates"], dict[str, dict[float, float]]()
    while more := [(method, rate) for method in cell.methods for rate in rates_to_try(grid, tried.get(method, {}))]:
        runs = [(method, rate) for method in tried for rate in tried[method]] + more
        configs = {tuned_name(*one): functools.partial(cell.tuning_config, *one) for one in runs}
        run(cell.directory / RATES, cell.tuning["seeds"], configs)
        tried = validation_accuracies(load_comparison(cell.directory / RATES))
    return {method: best_rate(tried[method]) for method in cell.methods}


def read_grids(recipe: Recipe, wanted: str | None, output: Path) -> Iterator[tuple[str, Iterator[Cell]]]:
    """Name and cells of each grid that is wanted. Raises ConfigError for what is missing or unknown in the study."""
    study = recipe.study
    for table in ("splits", "regimes", "tuning", "grids"):
        if not study.get(table):
            raise ConfigError(f"the study has no table [study.{table}]")
    tuning = {"settings": {}} | study["tuning"]
    check_keys("study.tuning", tuning, TUNING_KEYS)
    for name in [name.strip() for name in wanted.split(",")] if wanted else study["grids"]:
        if name not in study["grids"]:
            raise ConfigError(unknown_name("grid", name, study["grids"]))
        yield name, cells_of(recipe, name, tuning, output / name)


def cells_of(recipe: Recipe, grid_name: str, tuning: Mapping[str, Any], directory: Path) -> Iterator[Cell]:
    """A cell for every split and regime of a grid."""
    grid = recipe.study["grids"][grid_name]
    check_keys(f"study.grids.{grid_name}", grid, GRID_KEYS)
    methods = {short_name(method): method for method in grid["methods"]}
    for split in grid["splits"]:
        for regime in grid["regimes"]:
            yield Cell(
                directory / split / regime,
                replace(
                    recipe, settings=recipe.settings | axis(recipe, "splits", split) | axis(recipe, "regimes", regime)
                ),
                methods,
                grid["seeds"],
                tuning,
            )


def axis(recipe: Recipe, name: str, value: str) -> dict[str, Any]:
    """The settings of one split or regime."""
    known = recipe.study[name]
    if value not in known:
        raise ConfigError(unknown_name(name[:-1], value, known))
    return flatten(known[value])


def check_keys(table: str, given: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise ConfigError unless `given` has all of `keys` and no other."""
    for key in given:
        if key not in keys:
            raise ConfigError(f"[{table}]: {unknown_name('key', key, keys)}")
    if missing := [key for key in keys if key not in given]:
        raise ConfigError(f"[{table}] lacks {', '.join(missing)}")


def samples(cell: Cell) -> Iterator[Config]:
    """A configuration of every kind that the cell will run: what is wrong in it is known before anything starts.

    Raises ConfigError for a rule without a global model, which has no validation to choose a rate by.
    """
    from copra_fl.aggregation.compatibility import require_global_model

    rate = cell.tuning["learning-rates"][0]
    for method in cell.methods:
        require_global_model(cell.config(method, rate, cell.seeds[0]), f"by which {method!r} could choose its rate")
        yield cell.tuning_config(method, rate, cell.tuning["seeds"][0])
        yield cell.config(method, rate, cell.seeds[0])
