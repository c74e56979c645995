"""The command line, `copra-fl`: one file a command. Exit codes: 0; 1 the run failed; 2 bad usage or configuration."""

from __future__ import annotations

import sys
from typing import NoReturn

import click
import typer

from copra_fl.cli import assets, deploy, deploy_run, probe
from copra_fl.cli.bench import bench
from copra_fl.cli.chat import chat
from copra_fl.cli.compare import compare
from copra_fl.cli.config import config
from copra_fl.cli.probe_prune import prune
from copra_fl.cli.probe_shapley import shapley
from copra_fl.cli.recipes import recipes
from copra_fl.cli.report import report
from copra_fl.cli.simulate import simulate
from copra_fl.cli.study import study
from copra_fl.cli.track import track
from copra_fl.config import ConfigError
from copra_fl.deployment.compose_command import ComposeFailed
from copra_fl.files import CacheError
from copra_fl.simulation.superlink import RunFailed
from copra_fl.sources.assets import AssetError

#: what typer makes of Ctrl-C
INTERRUPTED = 130

app = typer.Typer(
    name="copra-fl",
    help="Federated LoRA with CopRA: simulate clients, compare methods, see whether adapters average well.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(simulate)
app.command()(compare)
app.command()(study)
app.command()(report)
app.command()(track)
app.command()(bench)
app.command()(config)
app.command()(recipes)
app.command()(chat)
probe.app.command()(prune)
probe.app.command()(shapley)
deploy.app.command()(deploy_run.run)
deploy.app.command()(deploy_run.status)
app.add_typer(deploy.app, name="deploy")
app.add_typer(probe.app, name="probe")
app.add_typer(assets.app, name="assets")


def main() -> None:
    """The console script."""
    try:
        code = app(standalone_mode=False)
    except ConfigError as error:
        fail(str(error), 2)
    except (RunFailed, AssetError, CacheError, ComposeFailed) as error:
        fail(str(error), 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if code == INTERRUPTED:
        fail("stopped; the same command goes on after the last finished round (all but study: with --resume)", code)
    sys.exit(code)


def fail(message: str, code: int) -> NoReturn:
    print(f"copra-fl: {message}", file=sys.stderr)
    sys.exit(code)
