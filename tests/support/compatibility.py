"""The compatibility check as preflight and server call it."""

from __future__ import annotations

from copra_fl.aggregation import compatibility
from copra_fl.config import Config
from copra_fl.tasks import find_task


def check(config: Config) -> None:
    """Check `config` with its own task. Raises ConfigError for an unknown task too."""
    compatibility.check(config, find_task(config.model.task))
