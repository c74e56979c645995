"""The command line, `copra-fl`: one file per command. Its exit codes are in exit_code.py."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import click
import typer

from copra_fl import plugins
from copra_fl.cli import assets, deploy, deploy_run, probe
from copra_fl.cli.bench import bench
from copra_fl.cli.chat import chat
from copra_fl.cli.clean import clean
from copra_fl.cli.compare import compare
from copra_fl.cli.config import config
from copra_fl.cli.deploy_audit import audit
from copra_fl.cli.exit_code import ExitCode
from copra_fl.cli.export import export
from copra_fl.cli.predict import predict
from copra_fl.cli.probe_prune import prune
from copra_fl.cli.probe_shapley import shapley
from copra_fl.cli.push import push
from copra_fl.cli.recipes import recipes
from copra_fl.cli.report import report
from copra_fl.cli.simulate import simulate
from copra_fl.cli.study import study
from copra_fl.cli.track import track
from copra_fl.config import ConfigError
from copra_fl.deployment.compose_command import ComposeFailed
from copra_fl.files import STORAGE_ERRORS, CacheError, in_words
from copra_fl.models.hub import PushError
from copra_fl.provenance import versions
from copra_fl.simulation.superlink import RunFailed
from copra_fl.sources.assets import AssetError, UnknownAssetError

#: command -> how it is continued after Ctrl-C; others are not
CONTINUED = {
    "simulate": "repeat the command with --resume and the --output of the run",
    "compare": "repeat the command with --resume and the --output of the comparison",
    "study": "repeat the command",
}


def show_version(is_given: bool) -> None:
    """Print the version of copra-fl and exit, for the option --version."""
    if is_given:
        print(f"copra-fl {versions()['copra-fl']}")
        raise typer.Exit


def examples(*commands: str) -> str:
    """Return the end of a command's help: one example per line."""
    return "\n\n".join(("[bold]Examples[/bold]", *commands))


app = typer.Typer(
    name="copra-fl",
    help="Federated LoRA with CopRA: simulate clients, compare methods, measure how well adapters average.",
    epilog=examples(
        "copra-fl simulate --recipe smoke",
        "copra-fl compare --recipe demo --methods lora,copra --seeds 0,1,2",
        "copra-fl --install-completion",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(
    epilog=examples(
        "copra-fl simulate --recipe smoke",
        "copra-fl simulate --set rule=fedex-lora --set num-rounds=10 --output runs/fedex",
        "copra-fl simulate --resume --output runs/fedex",
    )
)(simulate)
app.command(
    epilog=examples(
        "copra-fl compare --recipe demo --seeds 0,1,2",
        "copra-fl compare --methods lora,flora,flora+copra --set dataset=notes.csv",
    )
)(compare)
app.command(epilog=examples("copra-fl study smoke", "copra-fl study passes --grids optimizer"))(study)
app.command(epilog=examples("copra-fl report runs/demo", "copra-fl report runs/demo --figures figures"))(report)
app.command(epilog=examples("copra-fl track runs/demo --to tensorboard"))(track)
app.command(epilog=examples("copra-fl bench --quick"))(bench)
app.command(epilog=examples("copra-fl config learning-rate"))(config)
app.command()(recipes)
app.command(epilog=examples("copra-fl chat runs/shakespeare"))(chat)
app.command(epilog=examples("copra-fl predict runs/notes --data notes.csv --to predictions.csv"))(predict)
app.command(epilog=examples("copra-fl export runs/notes --merge --to my-model"))(export)
app.command(epilog=examples("copra-fl push runs/notes OWNER/NAME"))(push)
app.command(epilog=examples("copra-fl clean --dry-run", "copra-fl clean runs/demo --keep 1"))(clean)
probe.app.command(epilog=examples("copra-fl probe prune runs/demo/lora-seed0 runs/demo/copra-seed0"))(prune)
probe.app.command(epilog=examples("copra-fl probe shapley runs/demo/copra-seed0"))(shapley)
deploy.app.command()(deploy_run.run)
deploy.app.command()(deploy_run.status)
deploy.app.command()(audit)
app.add_typer(deploy.app, name="deploy")
app.add_typer(probe.app, name="probe")
app.add_typer(assets.app, name="assets")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command in `arguments` (default: those of the process) and exit with an `ExitCode`.

    SIGTERM, from a service manager or a scheduler, stops it as Ctrl-C does.
    """
    words = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plugins.add_current_folder()
    try:
        code = app(words, prog_name="copra-fl", standalone_mode=False)
    except (ConfigError, UnknownAssetError) as error:
        fail(str(error), ExitCode.USAGE)
    except (RunFailed, AssetError, CacheError, ComposeFailed, PushError) as error:
        fail(str(error), ExitCode.FAILED)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        fail(in_words(error), ExitCode.FAILED)
    except click.Abort:  # Ctrl-C, or the end of the input, at a question
        fail("nothing was changed", ExitCode.INTERRUPTED)
    except click.ClickException as error:  # exit_code is USAGE for click's own errors
        error.show()
        sys.exit(error.exit_code)
    except ValueError as error:
        from copra_fl.reporting.results import ResultsError  # slow to import

        if not isinstance(error, ResultsError):
            raise
        fail(str(error), ExitCode.USAGE)
    if code == ExitCode.INTERRUPTED:
        continued = CONTINUED.get(words[0])
        hint = f". To continue after the last finished round, {continued}" if continued else ""
        fail(f"stopped{hint}", ExitCode.INTERRUPTED)
    sys.exit(code or ExitCode.DONE)


def fail(message: str, code: ExitCode) -> NoReturn:
    """Print `message` on standard error and exit with `code`."""
    print(f"copra-fl: {message}", file=sys.stderr)
    sys.exit(code)
