"""A study: a grid of methods, seeds, learning rates, splits and regimes, run as one comparison after the other.

A study is a recipe with a table ``[study]``:

    [study.splits.NAME]    settings of the data: its partition, and the clients that take part
    [study.regimes.NAME]   settings of the schedule: rounds and local steps; in a table `methods` those of one method
    [study.tuning]         seeds, learning-rates, and optional settings of the runs that choose a learning rate
    [study.grids.NAME]     methods, seeds, splits, regimes, and an optional table `tuning`, whose keys replace those of
                           [study.tuning]

A cell of a grid is a split in a regime. In each cell every method's learning rate is chosen on validation data of the
tuning seeds; then the method runs at that rate with the grid's seeds. Finished runs are not repeated, so the same
command continues a study after a kill, and after seeds, methods or cells were added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from copra_fl.config import Config, ConfigError, flatten, read_toml
from copra_fl.simulation import preflight
from copra_fl.simulation.comparison import run_comparison, run_names, write_plan
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.simulation.recipes import Recipe, built_in_recipes, by_short_name, short_name
from copra_fl.simulation.run_folder import held
from copra_fl.simulation.study_tables import METHODS, check_study
from copra_fl.wording import join_words, unknown_name

if TYPE_CHECKING:  # slow to import
    from copra_fl.reporting.results import Comparison


@dataclass(frozen=True)
class StudyCell:
    """A split in a regime.

    Attributes:
        directory: folder of the cell's two comparisons.
        recipe: the study's recipe with the settings of split and regime.
        methods: short name -> name or file of each method.
        seeds: seeds of the test runs.
        tuning: the table ``[study.tuning]``, with the keys that the grid replaces.
        of_method: short name -> settings of this method in the cell's regime.
    """

    directory: Path
    recipe: Recipe
    methods: Mapping[str, str]
    seeds: list[int]
    tuning: Mapping[str, Any]
    of_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return ``SPLIT/REGIME``."""
        return f"{self.directory.parent.name}/{self.directory.name}"

    def has_finished(self) -> bool:
        """Return whether all test runs have finished."""
        from copra_fl.reporting.study import TEST  # slow to import

        return have_finished(self.directory / TEST, run_names(self.methods, self.seeds))

    def config(self, method: str, rate: float, seed: int) -> Config:
        """Return the configuration of a test run of `method` at the learning rate `rate`."""
        from copra_fl.reporting.study import rate_key  # slow to import

        config = self.recipe.config(self.methods[method], seed)
        regime = {**self.of_method.get(method, {}), **self.recipe.overrides}
        return Config.from_flat(config.to_flat() | regime | {rate_key(config): rate})

    def tuning_config(self, method: str, rate: float, seed: int) -> Config:
        """Return the configuration of a tuning run: the settings of ``[study.tuning]``, and no look at test data."""
        settings = {**self.tuning["settings"], "final-test": False}
        return Config.from_flat(self.config(method, rate, seed).to_flat() | settings)


def read_grids(recipe: Recipe, grids: str | None, output: Path) -> Iterator[tuple[str, Iterator[StudyCell]]]:
    """Yield name and cells of each grid in `grids` (separated by commas; None for all grids of the study).

    Raises ConfigError as `check_study` does, and for unknown names.
    """
    study = recipe.study
    if not study:
        others = [name for name, path in built_in_recipes().items() if "study" in read_toml(path)]
        raise ConfigError(f"the recipe has no table [study]; built-in recipes with one: {', '.join(others)}")
    check_study(study)
    tuning = {"settings": {}} | study["tuning"]
    for name in [name.strip() for name in grids.split(",")] if grids else study["grids"]:
        if name not in study["grids"]:
            raise ConfigError(unknown_name("grid", name, study["grids"]))
        yield name, grid_cells(recipe, name, tuning, output / name)


def grid_cells(recipe: Recipe, grid_name: str, tuning: Mapping[str, Any], directory: Path) -> Iterator[StudyCell]:
    """Yield a cell for every split and regime of a grid."""
    grid = recipe.study["grids"][grid_name]
    methods = by_short_name(grid["methods"])
    for split in grid["splits"]:
        for regime in grid["regimes"]:
            of_regime = dict(named_settings(recipe, "regimes", regime))
            of_method = settings_of_methods(recipe, regime, of_regime.pop(METHODS, {}))
            settings = named_settings(recipe, "splits", split) | of_regime
            cell_recipe = replace(recipe, settings=recipe.settings | settings)
            folder = directory / split / regime
            yield StudyCell(
                folder, cell_recipe, methods, grid["seeds"], {**tuning, **grid.get("tuning", {})}, of_method
            )


def choose_cells(cells_by_grid: Mapping[str, Sequence[StudyCell]], names: str | None) -> dict[str, Sequence[StudyCell]]:
    """Return grid -> the cells in `names` (separated by commas; None for all), and those that finished earlier.

    Grids without a cell in `names` are left out. Raises ConfigError for a name that is in no grid.
    """
    if names is None:
        return dict(cells_by_grid)
    chosen = [name.strip() for name in names.split(",")]
    known = {cell.name for cells in cells_by_grid.values() for cell in cells}
    for name in chosen:
        if name not in known:
            raise ConfigError(unknown_name("cell", name, known))
    return {
        grid: [cell for cell in cells if cell.name in chosen or cell.has_finished()]
        for grid, cells in cells_by_grid.items()
        if any(cell.name in chosen for cell in cells)
    }


def named_settings(recipe: Recipe, table: str, name: str) -> dict[str, Any]:
    """Return the settings of one split or regime. Raises ConfigError for an unknown name."""
    known = recipe.study[table]
    if name not in known:
        raise ConfigError(unknown_name(table.removesuffix("s"), name, known))
    return known[name]


def settings_of_methods(recipe: Recipe, regime: str, tables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return method -> settings in a regime. Raises ConfigError for a method that is in no grid."""
    known = dict.fromkeys(short_name(method) for grid in recipe.study["grids"].values() for method in grid["methods"])
    for method in tables:
        if method not in known:
            raise ConfigError(f"[study.regimes.{regime}.methods]: {unknown_name('method', method, known)}")
    return {method: flatten(settings) for method, settings in tables.items()}


def sample_configs(cell: StudyCell) -> Iterator[Config]:
    """Yield a tuning and a test configuration of each method, to check them before anything starts.

    Raises ConfigError for a rule without a global model, which has no validation accuracy to choose a rate by, and for
    settings that would replace the rate or end the runs at equal accuracies.
    """
    from copra_fl.aggregation.compatibility import require_global_model
    from copra_fl.reporting.study import rate_key  # slow to import

    rate = cell.tuning["learning-rates"][0]
    for method in cell.methods:
        test = cell.config(method, rate, cell.seeds[0])
        require_global_model(test, f"to choose the learning rate of {method!r} by")
        settings, key = {**cell.tuning["settings"], **cell.of_method.get(method, {})}, rate_key(test)
        if key in settings:
            raise ConfigError(
                f"{cell.name}: {key} = {settings[key]!r} is in the settings of the tuning or of {method!r} in its "
                "regime; leave it out, because the study chooses it"
            )
        tuning = cell.tuning_config(method, rate, cell.tuning["seeds"][0])
        if tuning.evaluation.target_accuracy:
            raise ConfigError(
                f"target-accuracy = {tuning.evaluation.target_accuracy:g} ends the runs that choose a learning rate at "
                "equal accuracies; set target-accuracy = 0 in the settings of [study.tuning]"
            )
        yield tuning
        yield test


def tune(cell: StudyCell, console: Console, request: WorkerRequest) -> dict[str, float]:
    """Return the best learning rate of each method; run the comparisons that are needed to find it.

    `copra_fl.reporting.study.rates_to_try` chooses the rates of each comparison from the results of the one before.
    Raises ConfigError for a method without a validation accuracy at a rate, which the search would try for ever.
    """
    from copra_fl.reporting.results import load_comparison  # slow to import
    from copra_fl.reporting.study import RATES, best_rate, rates_to_try, tuned_name, validation_accuracies

    seeds = cell.tuning["seeds"]
    accuracies: dict[str, dict[float, float]] = {}  # method -> learning rate -> validation accuracy
    while True:
        tried = {method: accuracies.get(method, {}) for method in cell.methods}
        new = {method: rates_to_try(cell.tuning["learning-rates"], tried[method]) for method in cell.methods}
        if not any(new.values()):
            return {method: best_rate(tried[method]) for method in cell.methods}
        variants = {
            tuned_name(method, rate): (method, rate)
            for method in cell.methods
            for rate in (*tried[method], *new[method])
        }
        configs = {
            run: cell.tuning_config(*variants[variant], seed)
            for run, (variant, seed) in run_names(variants, seeds).items()
        }
        finish_comparison(cell.directory / RATES, list(variants), seeds, configs, console, request)
        accuracies = validation_accuracies(load_comparison(cell.directory / RATES))
        for method, rates in new.items():
            if without := [rate for rate in rates if rate not in accuracies.get(method, {})]:
                raise ConfigError(
                    f"{cell.name}: method {method!r} has no validation accuracy at learning rates "
                    f"{join_words(without)}, so the study cannot choose one; runs: {cell.directory / RATES}"
                )


def run_test(cell: StudyCell, rates: Mapping[str, float], console: Console, request: WorkerRequest) -> Comparison:
    """Run the methods at their learning rates with the grid's seeds; return the comparison.

    Raises ConfigError as `check_rates` and `finish_comparison` do.
    """
    from copra_fl.reporting.results import load_comparison  # slow to import
    from copra_fl.reporting.study import TEST

    configs = {
        run: cell.config(method, rates[method], seed)
        for run, (method, seed) in run_names(cell.methods, cell.seeds).items()
    }
    check_rates(cell.directory / TEST, configs)
    finish_comparison(cell.directory / TEST, list(cell.methods), cell.seeds, configs, console, request)
    return load_comparison(cell.directory / TEST)


def check_rates(directory: Path, configs: Mapping[str, Config]) -> None:
    """Raise ConfigError if `directory` has runs at other learning rates than those that are chosen now.

    The choice changes when seeds or rates are added to the tuning.
    """
    from copra_fl.reporting.study import rate_key  # slow to import

    changed = []
    for run, config in configs.items():
        if (stored := directory / run / "config.toml").exists():
            key = rate_key(config)
            before, now = Config.from_toml(stored).to_flat()[key], config.to_flat()[key]
            if before != now:
                changed.append(f"{directory / run}: {key} {before} -> {now}")
    if changed:
        raise ConfigError(
            "the chosen learning rate has changed since these test runs; remove their folders, then repeat the command:"
            + "".join(f"\n  {line}" for line in changed)
        )


def finish_comparison(
    directory: Path,
    methods: list[str],
    seeds: list[int],
    configs: Mapping[str, Config],
    console: Console,
    request: WorkerRequest,
) -> None:
    """Run the unfinished runs of a comparison.

    If all are finished, only write the plan, because the folder may hold other runs from before the study was changed.
    Raises ConfigError for a run with another configuration, finished or not.
    """
    if have_finished(directory, configs):
        checked = preflight.check(configs.values(), console, request)
        with held(directory):
            write_plan(directory, methods, seeds, dict(zip(configs, checked, strict=True)))
    else:
        run_comparison(directory, methods, seeds, configs, console, request)


def have_finished(directory: Path, runs: Iterable[str]) -> bool:
    """Return whether all `runs` in the folder of a comparison have finished."""
    return all((directory / run / "summary.json").exists() for run in runs)
