"""The guard kills all processes that it started when its owner ends, orphans and unmarked ones included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from copra_fl.simulation import guard
from tests.support.real_runs import HANG_SECONDS, RealRun

#: the shell leaves an orphan without a mark, as Ray's agents are
ORPHAN = "(env -i sleep 1000 & echo $! > pid); exec sleep 1000"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
def test_orphans_without_a_mark_end_too(tmp_path: Path) -> None:
    command = [sys.executable, guard.__file__, "mark", "sh", "-c", ORPHAN]
    keeper = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE)
    pid = tmp_path / "pid"
    RealRun.wait_until(lambda: pid.exists() and pid.read_text().strip() != "", "the orphan")
    orphan = psutil.Process(int(pid.read_text()))
    keeper.communicate()
    assert not orphan.is_running()


def test_the_guard_ends_with_its_command(tmp_path: Path) -> None:
    keeper = subprocess.Popen([sys.executable, guard.__file__, "mark", "true"], stdin=subprocess.PIPE)
    assert keeper.wait(timeout=HANG_SECONDS) == 0
