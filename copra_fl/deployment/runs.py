"""Runs on a deployment: choose the run's folder, share assets, submit the run, follow its output, report it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from copra_fl.config import Config, ConfigError, Value, toml_value
from copra_fl.deployment.compose_command import ComposeCommand
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.registration import CONNECTION
from copra_fl.files import changed_files
from copra_fl.simulation.superlink import RunFailed
from copra_fl.sources.assets import asset_path

#: folders in the SuperLink's container: the Flower app (Dockerfile), and the run folders (docker-compose.yml)
APP, RUNS = "/app", "/runs"
#: Flower's status of a run that ended without an error
COMPLETED = "finished:completed"


def choose_name(layout: DeploymentLayout, output: str | None, resume: bool) -> str:
    """Return the name of the run's folder in DIR/runs: `output`; else the newest run if `resume`, else a new name.

    Raises ConfigError if `output` is not a plain name, or names an existing run without `resume`, or if there is no
    run to resume.
    """
    if output is not None and (Path(output).name != output or output == ".."):
        raise ConfigError(f"--output {output!r} is a path; use a plain name for a folder in {layout.runs}")
    if resume and output is None:
        configs = sorted(layout.runs.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
        if not configs:
            raise ConfigError(f"{layout.runs} has no run to resume; start one without --resume")
        return configs[-1].parent.name
    name = output or time.strftime("run-%Y%m%d-%H%M%S")
    if not resume and (layout.runs / name / "checkpoints").exists():
        raise ConfigError(f"{layout.runs / name} holds a run: --resume continues it, another --output starts a new run")
    return name


def share_assets(layout: DeploymentLayout, names: Iterable[str]) -> None:
    """Copy fetched assets to where the containers find them, unless they are there, undamaged.

    Raises AssetError for one that is not in the cache.
    """
    for source in map(asset_path, names):
        target = layout.assets / source.name
        if not changed_files(target):
            continue
        scratch = layout.assets / f".{source.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch, copy_function=shutil.copyfile)
        for path in (scratch, *scratch.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)


def submit(
    compose: ComposeCommand, config: Config, name: str, resume: bool, on_output: Callable[[], None]
) -> str | None:
    """Submit a run and print the server app's output until the run ends.

    `on_output` is called after each line. Returns Flower's status of the run, like finished:failed; None if the
    SuperLink does not answer. Raises RunFailed if Flower does not start the run.
    """
    defaults = Config().to_run_config()
    settings = {key: value for key, value in config.to_run_config().items() if defaults[key] != value}
    settings |= {"output": f"{RUNS}/{name}", "resume": resume}
    run_config = " ".join(f"{key}={flower_value(value)}" for key, value in settings.items())
    process = compose.start_in_superlink("flwr", "run", APP, CONNECTION, "--stream", "--run-config", run_config)
    assert process.stdout is not None
    run_id = None
    for line in process.stdout:
        print(line.rstrip(), file=sys.stderr)
        on_output()
        if run_id is None and (match := re.search(r"started run (\d+)", line)):
            run_id = match[1]
    process.wait()
    on_output()
    if run_id is None:
        raise RunFailed("Flower did not start the run; its output is above")
    try:
        answer = compose.run_in_superlink("flwr", "list", CONNECTION, "--run-id", run_id, "--format", "json")
        return str(json.loads(answer)["runs"][0]["status"])
    except (subprocess.CalledProcessError, ValueError, KeyError, IndexError):
        return None


def flower_value(value: Value) -> str:
    """Return `value` in TOML's notation, without a quote inside a string: there ``flwr run --run-config`` ends it."""
    if not isinstance(value, str):
        return toml_value(value)
    return '"' + "\\u0022".join(toml_value(part)[1:-1] for part in value.split('"')) + '"'


def report(compose: ComposeCommand, name: str, width: int) -> str:
    """Write report.html of a finished run, in the container, and return its table with lines of `width` characters.

    Raises RunFailed.
    """
    try:
        printed = compose.run_in_superlink("env", f"COLUMNS={width}", "copra-fl", "report", f"{RUNS}/{name}")
    except subprocess.CalledProcessError as error:
        raise RunFailed(f"the run completed, but its report could not be made: {error.stderr.strip()}") from None
    return printed.replace(f"{RUNS}/{name}", str(compose.layout.runs / name))
