"""The real `copra-fl` in a process of its own, with all processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SCRIPT = str(Path(sys.executable).parent / "copra-fl")
#: The longest that a test waits for anything. It ends a hang and nothing else: a loaded machine may be slow.
HANG_SECONDS = 1800


@dataclass
class RealRun:
    """`copra-fl ARGUMENTS`, started in `cwd`."""

    arguments: list[str]
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict)
    script: str = SCRIPT

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        environment = os.environ | self.environment | {"COPRA_FL_TEST": self.mark}
        self.process = subprocess.Popen(
            [self.script, *self.arguments], cwd=self.cwd, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, code: int = 0) -> tuple[str, str]:
        """Wait for the end; return standard output and error.

        Fails unless the exit code is `code` and all processes have ended.
        """
        out, err = self.process.communicate(timeout=HANG_SECONDS)
        assert self.process.returncode == code, f"exit code {self.process.returncode}\n{out}\n{err}"
        self.wait_until(lambda: not self.processes(), "no process left")
        return out, err

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Return the running processes of this command with `name` in their command lines."""
        return marked_processes(self.mark, name)

    @staticmethod
    def wait_until(condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what)


def marked_processes(mark: str, name: str = "") -> list[psutil.Process]:
    """Return the running processes with COPRA_FL_TEST=`mark` in their environment and `name` in their command lines."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("COPRA_FL_TEST") == mark and name in " ".join(process.cmdline()):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition` returns True; fail after HANG_SECONDS."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {HANG_SECONDS} s for: {what}"
        time.sleep(0.05)


def num_rounds(directory: Path) -> int:
    """Return the number of rounds in the journal of a run, which may not have begun."""
    path = directory / "journal.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def settings(flat: dict[str, object]) -> list[str]:
    """Return ``--set KEY=VALUE`` for each setting."""
    return [word for key, value in flat.items() for word in ("--set", f"{key}={value}")]
