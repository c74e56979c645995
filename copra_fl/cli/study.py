"""`copra-fl study`: run a study (`copra_fl.simulation.study`), a grid of comparisons at tuned learning rates."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from copra_fl.cli import options
from copra_fl.console import plain_console
from copra_fl.simulation import preflight
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe, refuse_idle
from copra_fl.simulation.study import choose_cells, read_grids, run_test, sample_configs, tune

GridsOption = Annotated[
    str | None, typer.Option("--grids", help="Grids of the study, separated by commas. Default: all, in file order.")
]
CellsOption = Annotated[
    str | None,
    typer.Option(
        "--cells",
        metavar="SPLIT/REGIME",
        help="Cells to run, separated by commas, with a report on these and on finished ones. Default: all.",
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output",
        help="Folder for the results; an earlier study in it is continued.",
        callback=options.writable_folder,
    ),
]
FileArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Recipe with a table \\[study]: a TOML file, or the name of a built-in recipe.",
        show_default=False,
    ),
]


def study(
    file: FileArgument,
    grids: GridsOption = None,
    cells: CellsOption = None,
    set_: options.SetOption = None,
    output: OutputOption = Path("runs/study"),
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusOption = None,
    ray_address: options.RayAddressOption = None,
) -> None:
    """Run or continue a study: compare methods at their best learning rates, in several splits and regimes."""
    console = plain_console(stderr=True)
    recipe, request = Recipe.read(file, set_ or []), WorkerRequest(workers, gpus_per_worker, ray_address)
    recipe.refuse_override("seed", "a study's seeds are those of its tables [study.grids.NAME]")
    recipe.refuse_override("learning-rate", "a study searches it among the learning-rates of its table [study.tuning]")
    all_cells = {grid: list(of_grid) for grid, of_grid in read_grids(recipe, grids, output.absolute())}
    cells_by_grid = choose_cells(all_cells, cells)
    samples = [config for of_grid in cells_by_grid.values() for cell in of_grid for config in sample_configs(cell)]
    refuse_idle(recipe.overrides, samples)
    preflight.check(samples, console, request)

    from copra_fl.reporting.statistics import summarize
    from copra_fl.reporting.study import write
    from copra_fl.reporting.terminal import results  # slow to import

    for grid, of_grid in cells_by_grid.items():
        directory = output.absolute() / grid
        for number, cell in enumerate(of_grid, start=1):
            console.rule(f"{grid} {number}/{len(of_grid)}: {cell.name}")
            rates = tune(cell, console, request)
            chosen = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
            console.print(f"learning rates: {chosen}")
            console.print(results(summarize(run_test(cell, rates, console, request))))
            finished = [cell.directory for cell in of_grid[:number]]
            write(directory, finished, shlex.join(["copra-fl", *sys.argv[1:]]))
        console.print(f"report: {directory / 'report.html'}, numbers: {directory / 'results.json'}", soft_wrap=True)
