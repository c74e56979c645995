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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from copra_fl import provenance
from copra_fl.cli.deploy import Directory
from copra_fl.cli.exit_code import ExitCode
from copra_fl.cli.options import RECIPE_HELP, JsonOption, ResumeOption, SetOption, TrackOption
from copra_fl.config import Config
from copra_fl.console import plain_console
from copra_fl.deployment import compose, nodes
from copra_fl.deployment.compose_command import find_compose
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.runs import COMPLETED, choose_name, report, share_assets, submit
from copra_fl.files import append_line
from copra_fl.simulation.preflight import fetch_with_progress
from copra_fl.simulation.recipes import Recipe, refuse_idle
from copra_fl.simulation.superlink import RunFailed, app_directory
from copra_fl.sources.assets import is_asset
from copra_fl.wording import foreign

if TYPE_CHECKING:
    from copra_fl.reporting.results import Run


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
    console, layout = plain_console(stderr=True), DeploymentLayout.open(directory)
    chosen = Recipe.read(recipe, set_ or [])
    config = chosen.config()
    if "num-clients" not in chosen.overrides:
        config = config.changed(num_clients=0)
        if config.federation.failures == "strict" and "min-nodes" not in chosen.overrides:
            config = config.changed(min_nodes=compose.num_clients(layout))  # each node has a client of its own
    refuse_idle(chosen.overrides, [config])
    check_combinations(config)
    run_folder = layout.runs / choose_name(layout, output, resume)
    sets = [word for text in set_ or [] for word in ("--set", text)]
    resume_command = shlex.join(
        ["copra-fl", "deploy", "run", recipe, str(directory), *sets, "--resume", "--output", run_folder.name]
    )
    console.print(f"run folder: {run_folder}", soft_wrap=True)
    compose_command = find_compose(layout)
    assets = sorted(filter(is_asset, {*config.data.datasets, config.model.model}))
    fetch_with_progress(assets, console)
    share_assets(layout, assets)

    from copra_fl.deployment.container_files import load_container_run, read_plain  # slow to import
    from copra_fl.trackers.feed import Tracking

    def load(folder: Path) -> Run:
        tracked = layout.tracking / folder.name
        tracked.mkdir(parents=True, exist_ok=True)
        return replace(load_container_run(folder), directory=tracked)

    record_submission(layout, config, run_folder.name)
    try:
        with closing(Tracking(track or [], [run_folder], console, load)) as tracking:
            status = submit(compose_command, config, run_folder.name, resume, tracking.update)
    except KeyboardInterrupt:
        console.print(f"detached; the run continues. Its progress: copra-fl deploy status {directory}", soft_wrap=True)
        sys.exit(ExitCode.INTERRUPTED)
    if status != COMPLETED or not (run_folder / "summary.json").exists():
        shown = status or "unknown: the SuperLink does not answer"
        raise RunFailed(
            f"the run did not complete (status {shown}); its output is above. To continue after its last round: "
            f"{resume_command}"
        )
    console.print(report(compose_command, run_folder.name, console.width), soft_wrap=True)
    if as_json:
        print(read_plain(run_folder, "summary.json").decode())


def record_submission(layout: DeploymentLayout, config: Config, run: str) -> None:
    """Append to the deployment's audit log who submits the `run`, from where, and with which command."""
    from copra_fl.aggregation.compatibility import with_explicit_parameters  # slow to import
    from copra_fl.records import AuditEvent  # slow to import
    from copra_fl.records.audit import now

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
    """Check that the settings combine, before anything starts. Raises ConfigError, also for a plugin not found here."""
    from copra_fl.aggregation import compatibility  # slow to import
    from copra_fl.tasks import find_task

    compatibility.check(config, find_task(config.model.task))


def status(directory: Directory, as_json: JsonOption = False) -> None:
    """Show the connected nodes, the progress of each run, and certificates that end soon."""
    from copra_fl.deployment import certificates

    layout = DeploymentLayout.open(directory)
    listed, runs = nodes.list_nodes(find_compose(layout)), list(read_runs(layout))
    days_left = certificates.days_left(layout.tls)
    if as_json:
        shown_nodes = None if listed is None else [vars(node) for node in listed]
        print(json.dumps({"nodes": shown_nodes, "runs": runs, "certificate_days_left": days_left}, indent=2))
        return
    from copra_fl.reporting.data_table import DataTable  # slow to import

    console = plain_console()
    if listed is None:
        hint = f"the SuperLink does not answer; start it with: copra-fl deploy up {directory}"
        console.print(hint, soft_wrap=True)
    else:
        rows = [[node.name, node.status, node.since] for node in listed]
        console.print(DataTable(["node", "status", "since (UTC)"], rows))
    columns = ["run", "round", "clients", "missing", "accuracy", "finished"]
    console.print(DataTable(columns, [[str(run[column]) for column in columns] for run in runs]))
    for warning in certificate_warnings(days_left, directory):
        console.print(warning, style="bold red", soft_wrap=True)


def certificate_warnings(days_left: dict[str, int], directory: Path) -> Iterator[str]:
    """Yield a warning for each certificate that ends within `WARNING_DAYS`, with the remedy."""
    from copra_fl.deployment.certificates import WARNING_DAYS

    remedies = {
        "server": f"copra-fl deploy rotate {directory} --certificate",
        "ca": "make a new deployment (docs/how-to/operate.md)",
    }
    for name, days in days_left.items():
        if days < WARNING_DAYS:
            end = f"ends in {days} days" if days >= 0 else "has ended, so that no client can connect"
            yield f"warning: the certificate of the {name if name == 'server' else 'CA'} {end}: {remedies[name]}"


def read_runs(layout: DeploymentLayout) -> Iterator[dict[str, Any]]:
    """Yield the progress of each run from its journal, the oldest first; of an unreadable run only its name."""
    from copra_fl.deployment.container_files import load_container_run, run_folders

    for folder in run_folders(layout.runs):
        row = {"run": foreign(folder.name), "round": "", "clients": 0, "missing": "", "accuracy": "", "finished": False}
        try:
            run = load_container_run(folder)
        except (ValueError, OSError, RecursionError):  # damaged, of another version of copra-fl, or no plain files
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
