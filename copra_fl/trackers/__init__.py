"""Runs in the trackers that people have already: TensorBoard, MLflow, Weights & Biases; one file each.

A tracker is fed from a run's folder and nothing else (feed.py), so that a run is tracked as it goes (`--track`) or
afterwards (`copra-fl track`) by the same code, and none of its processes knows of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from copra_fl.config import ConfigError
from copra_fl.wording import unknown_name

#: each is a file here, an extra of copra-fl, and the package that this extra installs
NAMES = ("tensorboard", "mlflow", "wandb")


def checked(names: Iterable[str] | None) -> list[str]:
    """`names` as a list. Raises ConfigError for a tracker that there is none of, or whose package is not installed."""
    names = list(names or [])
    for name in names:
        if name not in NAMES:
            raise ConfigError(unknown_name("tracker", name, NAMES))
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed: pip install 'copra-fl[{name}]'")
    return names
