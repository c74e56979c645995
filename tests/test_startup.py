"""How the processes of a run begin: the apps import nothing large, and threads sleep where torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def printed_by(code: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_apps_import_nothing_large() -> None:
    assert printed_by("import sys, clients.app, server.app; print({'torch', 'peft'} & sys.modules.keys())") == "set()"


def test_threads_sleep_at_barriers_and_garbage_is_collected() -> None:
    for module in ("clients.handlers", "server.runs"):
        code = f"import {module}, gc, os; print(os.environ['OMP_WAIT_POLICY'], gc.isenabled())"
        assert printed_by(code) == "PASSIVE True"
