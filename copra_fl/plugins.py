"""Plugins: rules, tasks, partitioners, trackers and assets of other packages.

A configuration names a plugin by its place, or by an entry point of an installed package:

    rule = "hospital.rules:CLIPPED"   the attribute CLIPPED of the module hospital.rules
    rule = "hospital.rules"           the same as hospital.rules:RULE (`Kind.attribute`; an asset needs the long form)
    rule = "clipped"                  the entry point clipped in the group copra_fl.rules

Every process of a run imports the module by this name. Server and nodes compare the `digests` of the plugins in their
handshake.
"""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from copra_fl.config import Config, ConfigError
from copra_fl.files import sha256
from copra_fl.provenance import source_digest
from copra_fl.wording import unknown_name

PLACE = re.compile(r"[^\W\d]\w*(\.\w+)*:\w+")
MODULE = re.compile(r"[^\W\d]\w*(\.\w+)+")
ENTRY_POINT = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Kind:
    """A kind of plugin.

    Attributes:
        name: the kind in messages.
        type_name: the type of its objects in messages.
        attribute: the attribute of a module that is named without one; empty: the attribute must be named, because a
            module's name could be that of a file.
    """

    name: str
    type_name: str
    attribute: str

    @property
    def group(self) -> str:
        """The group of its entry points."""
        return f"copra_fl.{self.name}s"

    def place(self, name: str) -> str | None:
        """Return MODULE:ATTRIBUTE of the plugin called `name`; None for a name that is not that of a plugin."""
        if PLACE.fullmatch(name):
            return name
        if self.attribute and MODULE.fullmatch(name):
            return f"{name}:{self.attribute}"
        return entry_points(self.group).get(name) if ENTRY_POINT.fullmatch(name) else None

    def find(self, name: str, cls: type, known: Iterable[str] = ()) -> Any:
        """Return the plugin called `name`, an instance of `cls`; `known` are the built-in names, for the message.

        Raises ConfigError for an unknown name, a module that cannot be imported, or an object of another type.
        """
        place = self.place(name)
        if place is None:
            raise ConfigError(
                f"{unknown_name(self.name, name, [*known, *entry_points(self.group)])}. A {self.name} of your own is "
                f"named by its place, as in hospital.{self.name}s:{self.attribute or self.name.upper()}"
            )
        module, _, attribute = place.partition(":")
        try:
            plugin = getattr(import_new(module), attribute, None)
        except ImportError as error:
            is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            if not is_missing:
                raise ConfigError(f"{self.name} {name!r}: its module {module} cannot be imported: {error}") from error
            plugin = None
        if not isinstance(plugin, cls):
            raise ConfigError(
                f"{self.name} {name!r}: there is no module {module} that can be imported and has {attribute}, "
                f"{self.type_name}. Install it, or add the folder that it lies in to PYTHONPATH"
            )
        return plugin


RULE = Kind("rule", "a Rule", "RULE")
TASK = Kind("task", "a Task", "TASK")
PARTITIONER = Kind("partitioner", "a Partitioner", "PARTITIONER")
TRACKER = Kind("tracker", "a function of a run", "TRACKER")
ASSET = Kind("asset", "an Asset", "")


@cache
def entry_points(group: str) -> dict[str, str]:
    """Return name -> MODULE:ATTRIBUTE of the entry points in `group`."""
    return {point.name: point.value for point in metadata.entry_points(group=group)}


def import_new(module: str) -> ModuleType:
    """Import a module, also one whose file was written a moment ago, as in a notebook."""
    if module not in sys.modules:
        importlib.invalidate_caches()
    return importlib.import_module(module)


def package(place: str) -> str:
    """Return the package, or the single module, that has the plugin at `place`."""
    return place.partition(":")[0].partition(".")[0]


def named_in(config: Config) -> dict[str, str]:
    """Return name -> place of the plugins that server and nodes of a run of `config` import."""
    data, model = config.data, config.model
    named = [(RULE, config.aggregation.rule), (TASK, model.task), (PARTITIONER, data.partitioner), (ASSET, model.model)]
    named += [(ASSET, dataset) for dataset in data.datasets]
    return {name: place for kind, name in named if (place := kind.place(name))}


def digests(config: Config) -> dict[str, str]:
    """Return name -> `digest` of the plugins of `config`, and of its `script`.

    Raises ConfigError for a plugin that cannot be imported and a script that cannot be read.
    """
    digests_by_name = {name: digest(name, place) for name, place in named_in(config).items()}
    return digests_by_name | ({"script": script_digest(config.training.script)} if config.training.script else {})


def script_digest(script: str) -> str:
    """Return the SHA-256 of the file `script`. Raises ConfigError if it cannot be read."""
    try:
        return sha256(Path(script).expanduser())
    except OSError as error:
        raise ConfigError(f"script = {script!r} cannot be read: {error.strerror}; it must be a Python file") from None


def digest(name: str, place: str) -> str:
    """Return the SHA-256 over the Python files of the package that has the plugin, or of the file of a single module.

    Raises ConfigError if it cannot be imported.
    """
    top = package(place)
    try:
        module = import_new(top)
    except ImportError as error:
        raise ConfigError(f"plugin {name!r}: {top} cannot be imported: {error}") from None
    folders = dict.fromkeys(getattr(module, "__path__", [module.__file__]))  # sys.path may have a folder twice
    return source_digest(*map(Path, folders))


def import_folders(configs: Iterable[Config]) -> list[str]:
    """Return the folders, beside those of installed packages, from which this process imports the plugins.

    Other processes need them in PYTHONPATH.
    """
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    names = {package(place) for config in configs for place in named_in(config).values()}
    folders: dict[str, None] = {}
    for name in sorted(names):
        try:
            spec = find_spec(name)
        except ValueError:  # a module without a specification, such as __main__
            continue
        if spec is not None:
            places = spec.submodule_search_locations or [spec.origin or ""]
            parents = (Path(place).resolve().parent for place in places)
            folders |= {str(parent): None for parent in parents if parent not in installed}
    return list(folders)


def add_current_folder() -> None:
    """Let this process import from its current folder, after all other folders, as `python -m` does before them."""
    folder = str(Path.cwd())
    if not sys.flags.safe_path and folder not in sys.path:
        sys.path.append(folder)
