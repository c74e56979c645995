"""From recipe, method and ``--set`` to configurations; and the checks before anything starts.

Precedence, weakest first: the defaults, the recipe, the method's file
(``experiments/methods/NAME.toml``), the recipe's own ``[methods.NAME]`` table, ``--set``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_fl.cli.flower import app_directory
from copra_fl.config import Config, ConfigError, Value, parse_override, read_toml, unknown


@dataclass(frozen=True)
class Recipe:
    """What to run: settings for every method, and settings of single methods."""

    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Value] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, overrides: Iterable[str]) -> Recipe:
        """The recipe in the file `name`, or one that comes with copra-fl (``demo``, ``smoke``, ``base``)."""
        path = Path(name)
        carried = {path.stem: path for path in (app_directory() / "experiments").glob("*.toml")}
        if not path.exists():
            if name not in carried:
                raise ConfigError(
                    f"no recipe file {name!r}. Recipes that come with copra-fl: {', '.join(sorted(carried))}"
                )
            path = carried[name]
        settings = read_toml(path)
        methods = settings.pop("methods", {})
        return cls(settings, methods, dict(parse_override(text) for text in overrides))

    def config(self, method: str | None = None, seed: int | None = None) -> Config:
        """The configuration of one run. Raises ConfigError for whatever is wrong in it."""
        flat = dict(self.settings)
        if method is not None:
            flat |= method_settings(method) | self.methods.get(Path(method).stem, {})
        flat |= self.overrides
        return Config.from_flat(flat if seed is None else flat | {"seed": seed})


def method_settings(method: str) -> dict[str, Any]:
    """The settings of a method that comes with copra-fl, or of a TOML file of one's own."""
    carried = {path.stem: path for path in (app_directory() / "experiments" / "methods").glob("*.toml")}
    path = carried.get(method, Path(method))
    if not path.is_file():
        raise ConfigError(unknown("method", method, carried))
    return read_toml(path)
