"""README and guides do what they say: their commands and snippets, in a copy of the repository.

The commands that name .venv/bin run, each once; a command that uses a run runs the command of that run first. All
others are parsed in tests/test_docs.py.
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
         "how-to/use-elsewhere", "how-to/track", "how-to/study", "how-to/deploy")))  # fmt: skip


def commands() -> list[str]:
    """Return each command that names .venv/bin or make, once, except those of pip, which would change this environment.

    Variables that a block exports precede its commands.
    """
    listed = []
    for block in (block for page in PAGES for block in blocks(page, "bash")):
        exported = ""
        for line in filter(None, (line.split("  #")[0].strip() for line in re.sub(r"\\\n +", "", block).splitlines())):
            if line.startswith("export "):
                exported += f"{line} && "
            elif ".venv/bin/pip" in line:
                continue
            elif ".venv/bin" in (command := exported + line) or line.startswith("make "):
                listed.append(command)
    return list(dict.fromkeys(listed))


class Reader:
    """A reader of the pages, who runs their commands in the folder `directory`, each once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._done: set[str] = set()

    def run(self, command: str) -> None:
        """Run `command` after the commands of the runs that it uses."""
        if command in self._done:
            return
        own = re.search(r"--output (runs/[\w-]+)", command)
        for folder in sorted(set(re.findall(r"runs/[\w-]+", command)) - {own and own[1]}):
            self.provide(folder)
        self._done.add(command)
        line = re.sub(r"^make ", "make --dry-run ", command)
        line = re.sub(r"(\$PWD/)?\.venv/bin", str(Path(sys.executable).parent), line)
        result = subprocess.run(
            line, shell=True, cwd=self.directory, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def provide(self, folder: str) -> Path:
        """Return the run folder, made by the command whose --output it is."""
        (command,) = (command for command in commands() if re.search(rf"--output {folder}( |$)", command))
        self.run(command)
        return self.directory / folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader with the files that git tracks or would; Flower's local SuperLink ends with the tests."""
    directory = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes((ROOT / name).read_bytes())
    home = str(directory / "flower-home")
    os.environ["FLWR_HOME"] = home
    yield Reader(directory)
    del os.environ["FLWR_HOME"]
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == home:
                process.kill()
        except psutil.Error:
            continue


def marked(command: str) -> Any:
    """Mark the commands that take minutes; shorter tests cover the same code.

    `compare` on the README's own CSV runs always, and what reads its runs.
    """
    slow = ("study", "probe", "simulate --recipe smoke")
    slow += (
        "compare --recipe smoke --methods",
        "report runs/compare",
        "track runs/compare",
        "export runs/notes/copra-seed0 --to",
    )
    is_slow = "flwr run" in command or any(f"copra-fl {name}" in command for name in slow)
    return pytest.param(command, marks=pytest.mark.slow) if is_slow else command


@pytest.mark.parametrize("command", [marked(command) for command in commands()])
def test_command(reader: Reader, command: str) -> None:
    """Make targets are only looked up: `make test` is what runs this, `make demo` is tests/test_demo.py."""
    reader.run(command)
    if "flwr run" in command:  # exits 0 also when the run failed
        runs = reader.directory.glob("runs/*/summary.json")
        (directory,) = (path.parent for path in runs if path.parent.name.isdigit())
        assert json.loads((directory / "summary.json").read_text())["rounds"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "run", "adapter", "num_labels"),
    [
        ("docs/tutorials/simulate-and-compare.md", "runs/smoke", "adapter", 16),
    ],
)
def test_snippet(reader: Reader, page: str, run: str, adapter: str, num_labels: int) -> None:
    """The snippet of how-to/trainer.md is in tests/test_callback.py."""
    (snippet,) = blocks(page, "python")
    folder = reader.provide(run)
    printed = subprocess.check_output([sys.executable, "-c", snippet], cwd=reader.directory, text=True)
    labels = json.loads((folder / adapter / "task.json").read_text())["labels"]
    assert printed.strip() in labels and len(labels) == num_labels


def test_the_merged_model_opens_in_a_pipeline(reader: Reader) -> None:
    (export,) = (command for command in commands() if "--merge" in command)
    reader.run(export)
    snippet = blocks("docs/how-to/use-elsewhere.md", "python")[0]
    printed = subprocess.check_output([sys.executable, "-c", snippet], cwd=reader.directory, text=True)
    assert printed.strip() in ("cardiology", "orthopedics", "pulmonology")


@needs_chromium
@pytest.mark.parametrize(
    "run", ["runs/notes", *(pytest.param(run, marks=pytest.mark.slow) for run in ("runs/smoke", "runs/compare"))]
)
def test_reports_open_in_a_browser(reader: Reader, run: str) -> None:
    folder = reader.provide(run)
    report.write(folder)  # again, because probes may have added figures
    check_page(folder / "report.html", num_figures(folder))
