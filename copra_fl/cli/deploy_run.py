"""`copra-fl deploy run | status`: submit a run to a deployment, and show the progress of its runs."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.console import Console

from copra_fl import provenance
from copra_fl.cli.deploy import Directory
from copra_fl.cli.options import RECIPE_HELP, JsonOption, ResumeOption, SetOption, TrackOption
from copra_fl.cli.report import show_results
from copra_fl.config import Config
from copra_fl.deployment import compose, nodes
from copra_fl.deployment.compose_command import find_compose
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.runs import COMPLETED, choose_name, submit
from copra_fl.files import append_line
from copra_fl.records import AuditEvent
from copra_fl.records.audit import now
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.superlink import RunFailed, app_directory


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP, show_default=False)],
    directory: Directory,
    set_: SetOption = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Name of the run's folder in DIR/runs. Default: a new name.")
    ] = None,
    resume: ResumeOption = False,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Submit a run and follow it. Each node is one client unless num-clients is set. Ctrl-C does not stop the run."""
    console, layout = Console(stderr=True), DeploymentLayout.open(directory)
    chosen = Recipe.read(recipe, set_ or [])
    config = chosen.config()
    if "num-clients" not in chosen.overrides:
        config = config.changed(num_clients=0)
        if config.federation.failures == "strict" and "min-nodes" not in chosen.overrides:
            config = config.changed(min_nodes=compose.num_clients(layout))  # each node has a client of its own
    check_combinations(config)
    run_folder = layout.runs / choose_name(layout, output, resume)
    sets = [word for text in set_ or [] for word in ("--set", text)]
    resume_command = shlex.join(
        ["copra-fl", "deploy", "run", recipe, str(directory), *sets, "--resume", "--output", run_folder.name]
    )
    console.print(f"run folder: {run_folder}", soft_wrap=True)
    compose_command = find_compose(layout)

    from copra_fl.trackers.feed import Tracking  # slow to import

    record_submission(layout, config, run_folder.name)
    try:
        with closing(Tracking(track or [], [run_folder], console)) as tracking:
            status = submit(compose_command, config, run_folder.name, resume, tracking.update)
    except KeyboardInterrupt:
        console.print(f"detached; the run continues. Its progress: copra-fl deploy status {directory}", soft_wrap=True)
        raise
    if status != COMPLETED or not (run_folder / "summary.json").exists():
        shown = status or "unknown: the SuperLink does not answer"
        raise RunFailed(
            f"the run did not complete (status {shown}); its output is above. To continue after its last round: "
            f"{resume_command}"
        )
    show_results(run_folder, console, as_json)


def record_submission(layout: DeploymentLayout, config: Config, run: str) -> None:
    """Append to the deployment's audit log who submits the `run`, from where, and with which command."""
    from copra_fl.aggregation.compatibility import with_explicit_parameters  # slow to import

    event = AuditEvent(
        time=now(),
        event="submitted",
        run=run,
        config_digest=with_explicit_parameters(config).digest,
        source_digest=provenance.library_digest(app_directory() / "clients"),
        user=user_name(),
        host=socket.gethostname(),
        command=shlex.join(["copra-fl", *sys.argv[1:]]),
    )
    append_line(layout.audit_logs[0], event.to_json())


def user_name() -> str:
    """Return the name of the user who runs this process; under sudo also that of the user who called sudo."""
    number = os.getuid()
    try:
        name = pwd.getpwuid(number).pw_name
    except KeyError:
        name = str(number)
    caller = os.environ.get("SUDO_USER") if number == 0 else None
    return f"{name} (sudo by {caller})" if caller else name


def check_combinations(config: Config) -> None:
    """Check that the settings combine, before anything starts. Raises ConfigError.

    A user's own task may be installed in the containers only; then the server checks.
    """
    if "." in config.model.task:
        return
    from copra_fl.aggregation import compatibility  # slow to import
    from copra_fl.tasks import find_task

    compatibility.check(config, find_task(config.model.task))


def status(directory: Directory, as_json: JsonOption = False) -> None:
    """Show the connected nodes and the progress of each run."""
    layout = DeploymentLayout.open(directory)
    listed, runs = nodes.list_nodes(find_compose(layout)), list(read_runs(layout))
    if as_json:
        print(
            json.dumps({"nodes": None if listed is None else [vars(node) for node in listed], "runs": runs}, indent=2)
        )
        return
    from copra_fl.reporting.tables import DataTable  # slow to import

    console = Console()
    if listed is None:
        console.print(f"the SuperLink does not answer; start it with: copra-fl deploy up {directory}", soft_wrap=True)
    else:
        rows = [[node.name, node.status, node.since] for node in listed]
        console.print(DataTable(["node", "status", "since (UTC)"], rows).rich())
    columns = ["run", "round", "clients", "missing", "accuracy", "finished"]
    console.print(DataTable(columns, [[str(run[column]) for column in columns] for run in runs]).rich())


def read_runs(layout: DeploymentLayout) -> Iterator[dict[str, Any]]:
    """Yield the progress of each run from its journal, the oldest first; of an unreadable run only its name."""
    from copra_fl.reporting.results import ResultsError, load_run

    for path in sorted(layout.runs.glob("*/config.toml"), key=lambda path: path.stat().st_mtime):
        row = {"run": path.parent.name, "round": "", "clients": 0, "missing": "", "accuracy": "", "finished": False}
        try:
            run = load_run(path.parent)
        except ResultsError:  # damaged, or of another version of copra-fl
            yield row | {"round": "unreadable"}
            continue
        row |= {
            "round": f"{len(run.journal)}/{run.config.federation.num_rounds}",
            "finished": run.summary is not None,
        }
        if run.journal:
            last = run.journal[-1]
            row |= {
                "clients": len(last.clients),
                "missing": ", ".join(str(client.client) for client in last.missing),
                "accuracy": round(last.validation.accuracy, 4) if last.validation else "",
            }
        yield row
