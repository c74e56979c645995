"""Runs of a ServerApp: one configuration, or those of a comparison one after another.

``output`` is a folder that the command line prepared (a run with its ``config.toml``, or a comparison with its
``comparison.toml``), or a new one for a plain ``flwr run``.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from logging import INFO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from flwr.app import Context
from flwr.serverapp import Grid
from flwr.supercore.logger import log

from copra_fl import startup
from copra_fl.aggregation.compatibility import with_explicit_parameters

startup.prepare()

from copra_fl.config import Config, ConfigError, read_toml
from copra_fl.events import emit
from copra_fl.files import DamagedFile, atomic_write
from copra_fl.records import RecordError
from server import audit, federation
from server.errors import FederationError
from server.journal import Journal

#: seconds to wait until an earlier process of a killed run releases the folder
LOCK_TIMEOUT = 60


def main(grid: Grid, context: Context) -> None:
    """Run all federations of a run configuration; report an error to the command line before it is raised."""
    flat = dict(context.run_config)
    output, resume = str(flat.pop("output")), bool(flat.pop("resume"))
    directory = Path(output or f"runs/{context.run_id}").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with audit.stops_recorded(directory), FileLock(directory / ".lock", timeout=LOCK_TIMEOUT):
            for run_directory, config in planned_runs(directory, flat, resume):
                log(INFO, "run folder: %s", run_directory)
                run(grid, config, run_directory)
    except Timeout:
        emit("failed", error=f"another run is writing to {directory}")
        raise
    except (FederationError, ConfigError, RecordError, DamagedFile) as error:
        emit("failed", error=str(error))
        raise
    except Exception:
        emit("failed", error=traceback.format_exc())
        raise


def run(grid: Grid, config: Config, directory: Path) -> None:
    """Run one federation. Raises FederationError if the disk is full."""
    try:
        federation.run(grid, config, directory)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise FederationError(
            f"the disk of {directory} is full; free some space, then continue after the last round with --resume"
        ) from error


def planned_runs(directory: Path, flat: dict[str, Any], resume: bool) -> Iterator[tuple[Path, Config]]:
    """Yield the runs of `directory` with their configurations, in order.

    Raises ConfigError if the folder already has a run, unless `resume`.
    """
    comparison = directory / "comparison.toml"
    if comparison.exists():
        plan = read_toml(comparison)
        names = [f"{method}-seed{seed}" for seed in plan["seeds"] for method in plan["methods"]]
        for name in names:
            yield directory / name, Config.from_toml(directory / name / "config.toml")
        return
    if Journal(directory).begun and not resume:
        raise ConfigError(f"{directory} already has a run; set resume=true to continue it, or another output")
    config = with_explicit_parameters(Config.from_run_config(flat))
    path = directory / "config.toml"
    if path.exists() and (differences := Config.from_toml(path).differences(config)):
        raise ConfigError(f"{directory} was begun with another configuration: {'; '.join(differences)}")
    atomic_write(path, config.to_toml())
    yield directory, config
