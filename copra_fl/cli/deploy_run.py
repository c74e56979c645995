"""`copra-fl deploy run | status`: submit a run to a deployment, and see how it stands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from copra_fl.cli.deploy import Directory
from copra_fl.cli.options import RECIPE_HELP, JsonOption, ResumeOption, SetOption, TrackOption
from copra_fl.config import Config, ConfigError, toml_value
from copra_fl.deployment import compose, compose_command, nodes
from copra_fl.deployment.compose_command import Engine
from copra_fl.deployment.layout import Folder
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.superlink import RunFailed

#: in the container: the Flower app (Dockerfile), and where runs leave their folders (docker-compose.yml)
APP, RUNS = "/app", "/runs"


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP)],
    directory: Directory,
    set_: SetOption = None,
    output: Annotated[str | None, typer.Option("--output", help="Name of the run's folder in DIR/runs.")] = None,
    resume: ResumeOption = False,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a run and follow it. Each node is one client, unless num-clients is set. Ctrl-C leaves the run alone."""
    console, folder = Console(stderr=True), Folder.open(directory)
    wanted = Recipe.read(recipe, set_ or [])
    config = wanted.config()
    if "num-clients" not in wanted.overrides:
        config = config.changed(num_clients=0)
        if config.federation.failures == "strict" and "min-nodes" not in wanted.overrides:
            config = config.changed(min_nodes=compose.num_clients(folder))  # each node has a client of its own
    run_folder = folder.runs / choose_name(folder, output, resume)
    sets = [word for text in set_ or [] for word in ("--set", text)]
    again = shlex.join(
        ["copra-fl", "deploy", "run", recipe, str(directory), *sets, "--resume", "--output", run_folder.name]
    )
    console.print(f"run folder: {run_folder}", soft_wrap=True)
    containers = compose_command.find(folder)

    from copra_fl.trackers.feed import Tracking  # slow to import

    try:
        with closing(Tracking(track or [], [run_folder], console)) as tracking:
            status = submit(containers, config, run_folder.name, resume, tracking.update)
    except KeyboardInterrupt:
        console.print(f"not followed any more, but going on: copra-fl deploy status {directory}", soft_wrap=True)
        raise
    if status != "finished:completed" or not (run_folder / "summary.json").exists():
        raise RunFailed(
            f"Flower says of the run: {status}; what happened is above. To go on after its last round: {again}"
        )

    from copra_fl.reporting.report import write  # slow to import, and not needed before
    from copra_fl.reporting.tables import table

    console.print(table(write(run_folder)))
    console.print(f"adapter: {run_folder / 'adapter'}\nreport: {run_folder / 'report.html'}", soft_wrap=True)
    if as_json:
        print((run_folder / "summary.json").read_text(encoding="utf-8"))


def choose_name(folder: Folder, output: str | None, resume: bool) -> str:
    """The run's folder below DIR/runs: as asked, the newest on `resume`, else a new one. Raises ConfigError."""
    if output is not None and (Path(output).name != output or output == ".."):
        raise ConfigError(
            f"--output {output!r} is a path; it must be a plain name, the run's folder is below {folder.runs}"
        )
    if resume and output is None:
        begun = sorted(folder.runs.glob("*/config.toml"), key=lambda path: path.stat().st_mtime)
        if not begun:
            raise ConfigError(f"there is no run to resume in {folder.runs}")
        return begun[-1].parent.name
    name = output or time.strftime("run-%Y%m%d-%H%M%S")
    if not resume and (folder.runs / name / "checkpoints").exists():
        raise ConfigError(f"{folder.runs / name} holds a run; --resume goes on with it, another --output starts anew")
    return name


def submit(containers: Engine, config: Config, name: str, resume: bool, heard: Callable[[], None]) -> str:
    """Submit a run, print what the server app says until it has ended: Flower's word on how, like finished:failed.

    `heard` is called after each line that it says.
    """
    defaults = Config().to_flat()
    wanted = {key: value for key, value in config.to_flat().items() if defaults[key] != value}
    wanted |= {"output": f"{RUNS}/{name}", "resume": resume}
    overrides = " ".join(f"{key}={toml_value(value)}" for key, value in wanted.items())
    process = containers.follow_in_superlink(
        "flwr", "run", APP, nodes.CONNECTION, "--stream", "--run-config", overrides
    )
    assert process.stdout is not None
    number = None
    for line in process.stdout:
        typer.echo(line.rstrip(), err=True)
        heard()
        if number is None and (found := re.search(r"started run (\d+)", line)):
            number = found[1]
    process.wait()
    heard()
    if number is None:
        raise RunFailed("Flower did not start the run; its words are above")
    try:
        answer = containers.in_superlink("flwr", "list", nodes.CONNECTION, "--run-id", number, "--format", "json")
        return str(json.loads(answer)["runs"][0]["status"])
    except (subprocess.CalledProcessError, ValueError, KeyError, IndexError):
        return "nothing, as the SuperLink does not answer"


def status(directory: Directory, as_json: JsonOption = False) -> None:
    """Who is connected, and how far each run is."""
    folder = Folder.open(directory)
    found, runs = nodes.find(compose_command.find(folder)), list(read_runs(folder))
    if as_json:
        print(json.dumps({"nodes": None if found is None else [vars(node) for node in found], "runs": runs}, indent=2))
        return
    console = Console()
    if found is None:
        console.print(f"the SuperLink does not answer; to start it: copra-fl deploy up {directory}", soft_wrap=True)
    else:
        console.print(as_table(["node", "status", "since (UTC)"], [[n.name, n.status, n.since] for n in found]))
    columns = ["run", "round", "clients", "missing", "accuracy", "finished"]
    console.print(as_table(columns, [[str(run[column]) for column in columns] for run in runs]))


def read_runs(folder: Folder) -> Iterator[dict[str, Any]]:
    """How far each run is, from its journal; the oldest first."""
    for path in sorted(folder.runs.glob("*/config.toml"), key=lambda path: path.stat().st_mtime):
        directory = path.parent
        journal = directory / "journal.jsonl"
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {"round": 0, "clients": [], "missing": []}
        accuracy = last.get("validation", {}).get("accuracy")
        yield {
            "run": directory.name,
            "round": f"{last['round']}/{Config.from_toml(path).federation.num_rounds}",
            "clients": len(last["clients"]),
            "missing": ", ".join(str(each["client"]) for each in last["missing"]),
            "accuracy": "" if accuracy is None else round(accuracy, 4),
            "finished": (directory / "summary.json").exists(),
        }


def as_table(columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
