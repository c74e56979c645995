"""The README does what it says: its commands and its snippet, in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from copra_fl.reporting import report
from tests.support.browser import check_page, needs_chromium
from tests.support.documents import README, ROOT, blocks
from tests.support.real_runs import HANG_SECONDS
from tests.support.run_folders import num_figures


def commands() -> list[str]:
    """Each line of the README's shell blocks; what a line exports is put before those that follow it."""
    found = []
    for block in blocks("bash"):
        exported = ""
        for line in filter(None, (line.split("  #")[0].strip() for line in block.splitlines())):
            if line.startswith("export "):
                exported += f"{line} && "
            else:
                found.append(exported + line)
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files that git tracks or would, in a folder of their own; Flower's local SuperLink ends with it."""
    directory = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes((ROOT / name).read_bytes())
    home = str(directory / "flower-home")
    os.environ["FLWR_HOME"] = home
    yield directory
    del os.environ["FLWR_HOME"]
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == home:
                process.kill()
        except psutil.Error:
            continue


def marked(command: str) -> Any:
    """A study takes minutes."""
    return pytest.param(command, marks=pytest.mark.slow) if "copra-fl study" in command else command


@pytest.mark.parametrize("command", [marked(command) for command in commands()])
def test_command(clone: Path, command: str) -> None:
    """Make targets are only looked up here: `make test` is what runs this, `make demo` is tests/test_demo.py."""
    if re.search(r"copra-fl deploy (up|run|down) ", command):
        pytest.skip("needs containers; tests/containers runs it")
    command = re.sub(r"^make ", "make --dry-run ", command)
    command = re.sub(r"(\$PWD/)?\.venv/bin", str(Path(sys.executable).parent), command)
    result = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    if "flwr run" in command:  # exits 0 also when the run failed
        (directory,) = (path.parent for path in clone.glob("runs/*/summary.json") if path.parent.name.isdigit())
        assert json.loads((directory / "summary.json").read_text())["rounds"] == 1


def test_snippet(clone: Path) -> None:
    """Needs the run that the first command of "Simulate" left."""
    snippet, _ = blocks("python")  # the other one: tests/test_callback.py
    result = subprocess.run([sys.executable, "-c", snippet], cwd=clone, capture_output=True, text=True, check=True)
    labels = json.loads((clone / "runs/smoke/adapter/task.json").read_text())["labels"]
    assert result.stdout.strip() in labels and len(labels) == 16


@needs_chromium
@pytest.mark.parametrize("run", ["smoke", "compare"])
def test_reports_open_in_a_browser(clone: Path, run: str) -> None:
    folder = clone / "runs" / run
    report.write(folder)  # again: the probes have left figures since
    check_page(folder / "report.html", num_figures(folder))


def test_the_file_tree_names_every_module() -> None:
    tree = README.split("## What is where")[1]
    modules = [path for folder in ("copra_fl", "clients", "server") for path in (ROOT / folder).glob("*.py")]
    assert [path.name for path in modules if path.name != "__init__.py" and path.name not in tree] == []
