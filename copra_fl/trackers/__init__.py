"""Trackers: runs in TensorBoard, MLflow and Weights & Biases, one file each.

A tracker reads only a run's folder (feed.py). So the same code tracks a run in progress (`--track`) and a finished one
(`copra-fl track`), and the processes of the run do not depend on it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from copra_fl.config import ConfigError
from copra_fl.provenance import pip_install
from copra_fl.wording import unknown_name

#: each is a module of this package, an extra of copra-fl, and the package that this extra installs
NAMES = ("tensorboard", "mlflow", "wandb")


def checked(names: Iterable[str] | None) -> list[str]:
    """Return `names` as a list. Raises ConfigError for an unknown tracker or a missing package."""
    names = list(names or [])
    for name in names:
        if name not in NAMES:
            raise ConfigError(unknown_name("tracker", name, NAMES))
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: {pip_install(name)}")
    return names
