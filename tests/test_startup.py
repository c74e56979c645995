"""Start of the processes of a run: the apps import nothing large, and torch's threads sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def printed_by(code: str) -> str:
    """Return the standard output of a new Python process in which nobody has set OMP_WAIT_POLICY."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_apps_import_nothing_large() -> None:
    assert printed_by("import sys, clients.app, server.app; print({'torch', 'peft'} & sys.modules.keys())") == "set()"


@pytest.mark.parametrize("module", ["clients.handlers", "server.runs"])
def test_threads_sleep_at_barriers_and_garbage_collection_is_on(module: str) -> None:
    code = f"import {module}, gc, os; print(os.environ['OMP_WAIT_POLICY'], gc.isenabled(), gc.get_freeze_count() > 1e5)"
    assert printed_by(code) == "PASSIVE True True"


@pytest.mark.parametrize("command", ["--help", "simulate --help", "deploy run --help", "probe shapley --help"])
def test_help_imports_nothing_large(command: str) -> None:
    """`--help` answers in a third of a second; each of these modules would add seconds."""
    large = {"torch", "pandas", "numpy", "scipy", "flwr", "ray", "plotly", "pydantic", "cryptography"}
    code = (
        f"import sys; sys.argv = ['copra-fl', *{command.split()}]\n"
        "from copra_fl.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('code', end.code)\n"
        f"print({large} & sys.modules.keys())"
    )
    assert printed_by(code).splitlines()[-2:] == ["code 0", "set()"]
