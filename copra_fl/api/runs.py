"""Simulate runs and comparisons from Python, by the code of `copra-fl simulate` and `copra-fl compare`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from copra_fl.api.inputs import as_settings, lora_settings, store_model, store_table
from copra_fl.api.words import python_name, python_words
from copra_fl.config import KEYS, Config, ConfigError, flatten, kebab, unknown_key
from copra_fl.console import plain_console
from copra_fl.simulation.comparison import (
    DEFAULT_PLAN,
    expand_all,
    find_plan,
    refuse_dropped,
    refuse_equal,
    run_comparison,
    run_names,
)
from copra_fl.simulation.ray_cluster import WorkerRequest, check_address
from copra_fl.simulation.recipes import TABLES, Recipe, by_short_name, refuse_idle
from copra_fl.simulation.run_folder import FOLDER_NAME, choose_output
from copra_fl.simulation.single_run import choose_config, run_single
from copra_fl.trackers import checked
from copra_fl.wording import join_words

if TYPE_CHECKING:  # slow to import
    import datasets
    import pandas as pd
    from peft import LoraConfig

    from copra_fl.records import RoundRecord
    from copra_fl.reporting.results import Comparison, Run

#: a recipe: the name of a built-in one, a TOML file, its content, or a whole configuration
RecipeLike = str | Path | Mapping[str, Any] | Config


def simulate(
    recipe: RecipeLike | None = None,
    *,
    data: pd.DataFrame | datasets.Dataset | None = None,
    test_data: pd.DataFrame | datasets.Dataset | None = None,
    lora: LoraConfig | None = None,
    processor: Any = None,
    output: str | Path | None = None,
    callback: Callable[[RoundRecord], object] | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    ray_address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    track: Iterable[str] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Simulate one federation with Flower on Ray, as `copra-fl simulate` does; write and return its results.

    Every configuration key is a keyword argument, with _ for -: ``learning_rate=1e-3``. A list stands for a line of
    CSV, a table for the parameters of a rule: ``trimmed_mean={"trim_fraction": 0.1}``. Interrupted or killed, the call
    leaves no process behind; `resume` continues after the last finished round.

    Args:
        recipe: a built-in recipe, a TOML file, its content as a mapping, or a `Config`; by default the recipe ``base``.
        data: the examples, in memory, in place of ``dataset``; ``text_column``, ``label_column`` and ``client_column``
            name its columns. They are stored in the cache, readable by this user only.
        test_data: the test set, in place of ``test_file``.
        lora: rank, alpha, dropout, scaling and target modules of the adapters, in place of settings.
        processor: tokenizer or image processor of a ``model`` that is a Transformers model in memory; by default that
            of the name or path that the model was loaded from. A head of the model is not used.
        output: folder for the results; by default a new folder in ``runs``.
        callback: called in this process with the record of each new round. If it raises, the run stops.
        workers: number of Ray workers; by default one per core, at most 4.
        gpus_per_worker: GPUs of a worker, which may be a fraction; by default all GPUs, shared evenly.
        ray_address: HOST:PORT of a Ray cluster; by default Ray is started on this machine.
        resume: continue the run in `output`; without other arguments with its own settings.
        overwrite: delete an earlier run in `output`.
        track: names of trackers.
        progress: show progress and notes.
        **settings: configuration keys.

    Raises ConfigError before anything starts if the arguments cannot run, and RunFailed if the run does not finish.
    """
    _check_callback(callback, "record")
    given = _settings(simulate, settings, data, test_data, lora, processor)
    with python_words(given):
        console, track, folder = open_console(progress), checked(track), _path(output)
        request = WorkerRequest(workers, gpus_per_worker, check_address(ray_address))
        directory = choose_output(folder, "simulate", resume, overwrite)
        config = choose_config(directory, open_recipe(recipe, given), continues=resume and recipe is None)
        refuse_idle(map(kebab, flatten(settings)), [config])
        rounds = NewRounds([directory], resume, lambda _, record: callback(record) if callback else None)
        run_single(directory, config, console, request, resume, overwrite, track, rounds.update)

        from copra_fl.reporting.report import write  # slow to import
        from copra_fl.reporting.results import load_run

        write(directory)
        return load_run(directory)


def compare(
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    recipe: RecipeLike | None = None,
    data: pd.DataFrame | datasets.Dataset | None = None,
    test_data: pd.DataFrame | datasets.Dataset | None = None,
    lora: LoraConfig | None = None,
    processor: Any = None,
    output: str | Path | None = None,
    callback: Callable[[str, int, RoundRecord], object] | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    ray_address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    track: Iterable[str] = (),
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Compare methods over seeds, paired by seed, as `copra-fl compare` does; write and return the results.

    The arguments that `simulate` has too are explained there.

    Args:
        methods: names of built-in methods or TOML files, ``flora+copra`` for two together, ``all`` for all built-in
            ones; or name -> settings, where a built-in name has its own settings first:
            ``{"lora": {}, "mine": {"rule": "hospital.rules:RULE"}}``. The first method is the baseline. Default: those
            of the comparison that `resume` continues, else ``["lora", "copra"]``.
        seeds: every method runs with every seed. Default: those of the comparison that `resume` continues, else
            ``[0, 1, 2]``.
        callback: called with method, seed and record of each new round.
        **settings: configuration keys of all methods; they override those of a method.

    Raises ConfigError before anything starts if the arguments cannot run, and RunFailed if a run does not finish.
    """
    if "seed" in settings:
        raise ConfigError(f"compare takes seeds, not a seed: seeds=[{settings['seed']!r}]")
    _check_callback(callback, "method", "seed", "record")
    given = _settings(compare, settings, data, test_data, lora, processor)
    with python_words(given):
        console, track, folder = open_console(progress), checked(track), _path(output)
        request = WorkerRequest(workers, gpus_per_worker, check_address(ray_address))
        directory = choose_output(folder, "compare", resume, overwrite)
        earlier = find_plan(directory) if resume else None
        if earlier and recipe is None and not given and methods is None and seeds is None:
            names, numbers, configs = earlier
        else:
            default_methods, default_seeds, _ = earlier or DEFAULT_PLAN
            chosen, numbers = open_recipe(recipe, given), _check_seeds(default_seeds if seeds is None else seeds)
            tables = _tables(default_methods if methods is None else methods, chosen, console)
            names = list(tables)
            configs = {
                run: chosen.config(tables[method].method, seed, tables[method].settings)
                for run, (method, seed) in run_names(names, numbers).items()
            }
            refuse_equal(run_names(names, numbers), configs)
            refuse_idle(map(kebab, flatten(settings)), configs.values())
        refuse_dropped(directory, earlier, configs)
        runs = run_names(names, numbers)
        rounds = NewRounds(
            [directory / run for run in runs],
            resume,
            lambda run, record: callback(runs[run.name][0], runs[run.name][1], record) if callback else None,
        )
        run_comparison(directory, names, numbers, configs, console, request, overwrite, track, rounds.update)

        from copra_fl.reporting.report import write  # slow to import
        from copra_fl.reporting.results import load_comparison

        write(directory)
        return load_comparison(directory)


@dataclass(frozen=True)
class MethodSettings:
    """A method of a comparison: a name that recipes know, or None; and settings on top of it."""

    method: str | None
    settings: Mapping[str, Any]


class NewRounds:
    """Calls `callback` with folder and record of each round that the runs in `directories` finish from now on."""

    def __init__(
        self, directories: Iterable[Path], resume: bool, callback: Callable[[Path, RoundRecord], object]
    ) -> None:
        self._callback = callback
        self._done = {folder: len(_records(folder)) if resume else 0 for folder in directories}

    def update(self) -> None:
        for folder, done in self._done.items():
            records = _records(folder)
            for record in records[done:]:
                self._callback(folder, record)
            self._done[folder] = max(done, len(records))


def open_recipe(recipe: RecipeLike | None, overrides: Mapping[str, Any]) -> Recipe:
    """Return `recipe` with settings that override its own. Raises ConfigError as `Recipe.read` does."""
    if isinstance(recipe, Config):
        return Recipe(recipe.to_flat(), overrides=dict(overrides))
    if isinstance(recipe, Mapping):
        settings = {name: value for name, value in recipe.items() if name not in TABLES}
        return Recipe.of(as_settings(settings) | {name: recipe[name] for name in TABLES if name in recipe}, overrides)
    return replace(Recipe.read(str(recipe or "base"), []), overrides=dict(overrides))


def open_console(progress: bool) -> Console:
    """Return the console on standard error; a quiet one without `progress`.

    In a notebook without ipywidgets, which rich needs for its bars, each finished round is a line of text.
    """
    console = plain_console(stderr=True)
    if not progress or (console.is_jupyter and find_spec("ipywidgets") is None):
        return plain_console(stderr=True, quiet=not progress, force_jupyter=False)
    return console


def _settings(
    function: Callable[..., object],
    settings: Mapping[str, Any],
    data: Any,
    test_data: Any,
    lora: LoraConfig | None,
    processor: Any,
) -> dict[str, Any]:
    """Return all settings in the arguments of `function`. Raises ConfigError for an unknown or doubled one."""
    given = dict(settings)
    objects: dict[str, Any] = {}
    if given.get("model") is not None and not isinstance(given["model"], str | Path):
        objects["model"] = store_model(given.pop("model"), processor)
    elif processor is not None:
        raise ConfigError("processor belongs to a model in memory; a model that is named has its own")
    plain = as_settings(given)
    arguments = [*map(python_name, KEYS), *signature(function).parameters]
    for name in plain:
        if name not in KEYS and "." not in name:
            raise ConfigError(unknown_key(f"argument of {function.__name__}", python_name(name), arguments))
    if data is not None:
        objects["dataset"] = store_table("data", data)
    if test_data is not None:
        objects["test-file"] = store_table("test_data", test_data)
    if lora is not None:
        objects |= lora_settings(lora)
    if doubled := sorted(objects.keys() & plain.keys()):
        raise ConfigError(f"{join_words(doubled)}: given twice, as a setting and by an object; leave one out")
    return plain | objects


def _check_callback(callback: Callable[..., object] | None, *names: str) -> None:
    """Raise ConfigError unless `callback` is None, or can be called with the arguments `names`."""
    if callback is None:
        return
    try:
        signature(callback).bind(*names)
    except TypeError as error:
        raise ConfigError(
            f"callback = {callback!r} must be a function that takes {join_words(names)}: {error}"
        ) from None
    except ValueError:  # a callable of C has no signature
        pass


def _tables(methods: Sequence[str] | Mapping[str, Any], recipe: Recipe, console: Console) -> dict[str, MethodSettings]:
    """Return the methods of a comparison by name.

    Raises ConfigError for a wrong or repeated name, without any, and for settings that are no mapping.
    """
    if not methods:
        raise ConfigError("methods is empty; name at least one method")
    names = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"methods = {methods!r} must be names or TOML files as texts, such as 'lora'")
    if not isinstance(methods, Mapping):
        sources = expand_all(by_short_name(names), recipe, console)
        return {name: MethodSettings(source, {}) for name, source in sources.items()}
    tables = {}
    for name, table in methods.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"method {name!r}: its settings {table!r} must be a mapping; {{}} for none of its own")
        is_known = recipe.knows(name)
        if not is_known and not FOLDER_NAME.fullmatch(name):
            raise ConfigError(f"method {name!r}: the name of a method of your own has letters, digits, _, - and . only")
        tables[name] = MethodSettings(name if is_known else None, as_settings(table))
    return tables


def _check_seeds(seeds: Sequence[int]) -> list[int]:
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"seeds = {seeds!r} must be whole numbers, at least one, each once")
    return numbers


def _records(folder: Path) -> list[RoundRecord]:
    from copra_fl.records import read_lines  # slow to import

    path = folder / "journal.jsonl"
    return read_lines(path)[0] if path.exists() else []


def _path(output: str | Path | None) -> Path | None:
    return None if output is None else Path(output).expanduser()
