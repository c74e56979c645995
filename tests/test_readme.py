"""README and guides do what they say: their commands and snippets, in a copy of the repository.

The commands that name .venv/bin run, page by page in the order of `PAGES`, since later ones use the results of earlier
ones. All others are parsed in tests/test_docs.py.
"""

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
from tests.support.documents import ROOT, blocks
from tests.support.real_runs import HANG_SECONDS
from tests.support.run_folders import num_figures

PAGES = ("README.md", *(f"docs/{page}.md" for page in ("tutorials/simulate-and-compare", "tutorials/your-own-data",
         "how-to/track", "how-to/study", "how-to/deploy")))  # fmt: skip


def commands() -> list[str]:
    """Return each command that names .venv/bin or make, once; variables that a block exports precede its commands."""
    listed = []
    for block in (block for page in PAGES for block in blocks(page, "bash")):
        exported = ""
        for line in filter(None, (line.split("  #")[0].strip() for line in re.sub(r"\\\n +", "", block).splitlines())):
            if line.startswith("export "):
                exported += f"{line} && "
            elif ".venv/bin" in (command := exported + line) or line.startswith("make "):
                listed.append(command)
    return list(dict.fromkeys(listed))


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
    """Mark the commands that take minutes; shorter tests cover the same code."""
    is_slow = any(f"copra-fl {name}" in command for name in ("study", "probe shapley", "probe prune"))
    return pytest.param(command, marks=pytest.mark.slow) if is_slow else command


@pytest.mark.parametrize("command", [marked(command) for command in commands()])
def test_command(clone: Path, command: str) -> None:
    """Make targets are only looked up here: `make test` is what runs this, `make demo` is tests/test_demo.py."""
    command = re.sub(r"^make ", "make --dry-run ", command)
    command = re.sub(r"(\$PWD/)?\.venv/bin", str(Path(sys.executable).parent), command)
    result = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    if "flwr run" in command:  # exits 0 also when the run failed
        (directory,) = (path.parent for path in clone.glob("runs/*/summary.json") if path.parent.name.isdigit())
        assert json.loads((directory / "summary.json").read_text())["rounds"] == 1


@pytest.mark.parametrize(
    ("page", "adapter"),
    [("README.md", "runs/notes/copra-seed0/adapter"), ("docs/tutorials/simulate-and-compare.md", "runs/smoke/adapter")],
)
def test_snippet(clone: Path, page: str, adapter: str) -> None:
    """Needs the runs that commands of the same page left. The snippet of how-to/trainer.md: tests/test_callback.py."""
    (snippet,) = blocks(page, "python")
    result = subprocess.run([sys.executable, "-c", snippet], cwd=clone, capture_output=True, text=True, check=True)
    labels = json.loads((clone / adapter / "task.json").read_text())["labels"]
    assert result.stdout.strip() in labels and len(labels) == {"README.md": 3}.get(page, 16)


@needs_chromium
@pytest.mark.parametrize("run", ["smoke", "compare"])
def test_reports_open_in_a_browser(clone: Path, run: str) -> None:
    folder = clone / "runs" / run
    report.write(folder)  # again: the probes have left figures since
    check_page(folder / "report.html", num_figures(folder))
