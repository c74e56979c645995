"""Check of the tables of a study (`copra_fl.simulation.study` says what they mean), before anything reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from copra_fl.config import KEYS, ConfigError, Key, as_table
from copra_fl.simulation.run_folder import FOLDER_NAME
from copra_fl.wording import join_words, unknown_name

TABLES = ("splits", "regimes", "tuning", "grids")
TUNING_KEYS = ("seeds", "learning-rates", "settings")
GRID_KEYS = ("methods", "seeds", "splits", "regimes")
#: key of a regime's table with the settings of single methods: method -> settings
METHODS = "methods"
NAME = Key("name", "study", "name", "", "a name")
#: key of a list -> key that says which values it may have
LISTS = {
    "seeds": KEYS["seed"],
    "learning-rates": KEYS["learning-rate"],
    "methods": NAME,
    "splits": NAME,
    "regimes": NAME,
}
#: setting that a study chooses for each run -> where it finds its values
CHOSEN = {"seed": "the seeds of its grids and of [study.tuning]", "learning-rate": "learning-rates of [study.tuning]"}


def check_study(study: Mapping[str, Any]) -> None:
    """Raise ConfigError for a missing or unknown table or key, and for a value that it cannot have.

    The values of settings are not checked.
    """
    for table in TABLES:
        if not as_table(f"study.{table}", study.get(table, {})):
            raise ConfigError(f"the study has no table [study.{table}]")
    check_keys("study", study, TABLES)
    for table in ("splits", "regimes", "grids"):
        for name, content in study[table].items():
            as_table(f"study.{table}.{name}", content)
            if not FOLDER_NAME.fullmatch(name):
                raise ConfigError(
                    f"[study.{table}]: {name!r} must have letters, digits, _, - and . only: it is a folder"
                )
    for name, settings in study["splits"].items():
        check_settings(f"study.splits.{name}", settings)
    for name, settings in study["regimes"].items():
        check_settings(f"study.regimes.{name}", settings)
        for method, own in as_table(f"study.regimes.{name}.{METHODS}", settings.get(METHODS, {})).items():
            check_settings(f"study.regimes.{name}.{METHODS}.{method}", own)
    tuning = {"settings": {}} | study["tuning"]
    check_tuning("study.tuning", tuning)
    for name, grid in study["grids"].items():
        check_grid(f"study.grids.{name}", grid, tuning)


def check_grid(table: str, grid: Mapping[str, Any], tuning: Mapping[str, Any]) -> None:
    """Raise ConfigError for wrong keys and values of a grid, and for seeds that its tuning has too."""
    check_keys(table, {key: value for key, value in grid.items() if key != "tuning"}, GRID_KEYS)
    for key in GRID_KEYS:
        check_list(f"{table}.{key}", grid[key], LISTS[key])
    tuning = {**tuning, **as_table(f"{table}.tuning", grid.get("tuning", {}))}
    check_tuning(f"{table}.tuning", tuning)
    if common := [seed for seed in grid["seeds"] if seed in tuning["seeds"]]:
        raise ConfigError(
            f"[{table}]: seeds {join_words(common)} of the tuning must not be reported too; choose other seeds for one"
        )


def check_tuning(table: str, tuning: Mapping[str, Any]) -> None:
    """Raise ConfigError for wrong keys and values of a tuning."""
    check_keys(table, tuning, TUNING_KEYS)
    for key in ("seeds", "learning-rates"):
        check_list(f"{table}.{key}", tuning[key], LISTS[key])
    check_settings(f"{table}.settings", tuning["settings"])


def check_settings(table: str, settings: Any) -> None:
    """Raise ConfigError unless `settings` is a table without settings that the study chooses."""
    for key, source in CHOSEN.items():
        if key in as_table(table, settings):
            raise ConfigError(f"[{table}]: {key} = {settings[key]!r}: leave it out; a study takes it from {source}")


def check_list(name: str, values: Any, key: Key) -> None:
    """Raise ConfigError unless `values` is a list of values that `key` may have, at least one, each once."""
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name} = {values!r} must be a list with at least one value, each {key.allowed}")
    for value in values:
        replace(key, name=f"{name}: {key.name}").check(value)
    if len(set(values)) < len(values):
        raise ConfigError(f"{name} = {values!r} must have each value once")


def check_keys(table: str, settings: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise ConfigError unless `settings` has all of `keys` and no other."""
    for key in settings:
        if key not in keys:
            raise ConfigError(f"[{table}]: {unknown_name('key', key, keys)}")
    if missing := [key for key in keys if key not in settings]:
        raise ConfigError(f"[{table}] lacks {', '.join(missing)}")
