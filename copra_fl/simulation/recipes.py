"""From recipe, method and ``--set`` to configurations; and the checks before anything starts.

A method is one name or several with ``+`` between them: ``flora+copra`` is flora.toml overlaid by copra.toml. A name
is a file that comes along (``experiments/methods/NAME.toml``), a TOML file of one's own, or a method that the recipe
itself makes with a table ``[methods.NAME]``.

Precedence, weakest first: the defaults; the recipe; its table ``[methods.T]``, where T is what the method trains
(local-training: copra, lora or head), so that ``flora`` gets the learning rate that a recipe has for lora and
``flora+copra`` that for copra; the method's files from left to right; the recipe's ``[methods.NAME]`` for its other
names, from left to right; ``--set``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_fl.config import Config, ConfigError, CopraConfig, Value, parse_override, read_toml
from copra_fl.simulation.superlink import app_directory
from copra_fl.wording import unknown_name


@dataclass(frozen=True)
class Recipe:
    """What to run: settings for every method, and settings of single methods; `study` is for cli/study.py."""

    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Value] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, overrides: Iterable[str]) -> Recipe:
        """The recipe in the file `name`, or one that comes with copra-fl (``demo``, ``smoke``, ``base``)."""
        path = Path(name)
        carried = carried_recipes()
        if not path.exists():
            if name not in carried:
                raise ConfigError(f"no recipe file {name!r}. Recipes that come with copra-fl: {', '.join(carried)}")
            path = carried[name]
        settings = read_toml(path)
        methods = settings.pop("methods", {})
        study = settings.pop("study", {})
        return cls(settings, methods, dict(parse_override(text) for text in overrides), study)

    def config(self, method: str | None = None, seed: int | None = None) -> Config:
        """The configuration of one run. Raises ConfigError for whatever is wrong in it."""
        flat = (self.settings if method is None else self._with_method(method)) | self.overrides
        return Config.from_flat(flat if seed is None else flat | {"seed": seed})

    def _with_method(self, method: str) -> dict[str, Any]:
        names = method.split("+")
        files = {name: self._method_settings(name) for name in names}
        overlaid = {key: value for settings in files.values() for key, value in settings.items()}
        for name, settings in files.items():
            if not any(overlaid[key] == value for key, value in settings.items()):
                raise ConfigError(f"method {method!r}: nothing is left of {name!r}, since later names win")
        training = (self.settings | overlaid | self.overrides).get("local-training", CopraConfig.local_training)
        flat = self.settings | self.methods.get(training, {}) | overlaid
        for name in names:
            if Path(name).stem != training:
                flat |= self.methods.get(Path(name).stem, {})
        return flat

    def _method_settings(self, name: str) -> dict[str, Any]:
        return self.methods[name] if name in self.methods.keys() - carried_methods() else method_settings(name)


def short_name(method: str) -> str:
    """What a method is called in tables and folders: ``flora+mine`` for ``flora+some/where/mine.toml``."""
    return "+".join(Path(name).stem for name in method.split("+"))


def carried_recipes() -> dict[str, Path]:
    """The recipes that come with copra-fl, by name."""
    return {path.stem: path for path in sorted((app_directory() / "experiments").glob("*.toml"))}


def carried_methods() -> dict[str, Path]:
    """The methods that come with copra-fl, by name."""
    return {path.stem: path for path in sorted((app_directory() / "experiments" / "methods").glob("*.toml"))}


def method_settings(method: str) -> dict[str, Any]:
    """The settings of one name: a method that comes with copra-fl, or a TOML file of one's own."""
    carried = carried_methods()
    path = carried.get(method, Path(method))
    if not path.is_file():
        raise ConfigError(unknown_name("method", method, carried))
    return read_toml(path)
