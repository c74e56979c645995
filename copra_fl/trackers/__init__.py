"""Trackers: runs in TensorBoard, MLflow and Weights & Biases, one file each.

A tracker reads only a run's folder (feed.py). So the same code tracks a run in progress (`--track`) and a finished one
(`copra-fl track`), and the processes of the run do not depend on it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from copra_fl import plugins
from copra_fl.config import ConfigError
from copra_fl.provenance import pip_install

if TYPE_CHECKING:
    from copra_fl.reporting.results import Run
    from copra_fl.trackers.feed import Tracker

#: each is a module of this package, an extra of copra-fl, and the package that this extra installs
NAMES = ("tensorboard", "mlflow", "wandb")


def checked(names: Iterable[str] | None) -> list[str]:
    """Return `names` as a list. Raises ConfigError for an unknown tracker, a missing package or a wrong plugin."""
    names = list(names or [])
    for name in names:
        if name not in NAMES:
            find_plugin(name)
        elif importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: {pip_install(name)}")
    return names


def find_tracker(name: str) -> Callable[[Run], Tracker]:
    """Return the function that opens a run in the tracker called `name`: a built-in one or a plugin."""
    if name in NAMES:
        track: Callable[[Run], Tracker] = importlib.import_module(f"{__name__}.{name}").track
        return track
    return find_plugin(name)


def find_plugin(name: str) -> Callable[[Run], Tracker]:
    """Return the tracker of another package called `name`. Raises ConfigError as `plugins.Kind.find` does."""
    plugin: Callable[[Run], Tracker] = plugins.TRACKER.find(name, Callable, NAMES)  # type: ignore[arg-type]
    return plugin
