"""The guard kills all processes that it started when its owner ends, orphans and unmarked ones included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from copra_fl.simulation import guard
from copra_fl.simulation.superlink import superlink, worker_variables
from tests.support.real_runs import HANG_SECONDS, RealRun, marked_processes, wait_until

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


def test_a_command_that_outlives_its_guard_ends_what_the_guard_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPRA_FL_TEST", "outlived")
    with superlink(tmp_path / "flower.log") as link:
        wait_until(lambda: bool(marked_processes("outlived", "flower-superexec")), "all processes of the SuperLink")
        link.guard.kill()
    assert not marked_processes("outlived")


def test_processes_in_other_folders_have_the_cache_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COPRA_FL_CACHE", "cache")
    assert worker_variables()["COPRA_FL_CACHE"] == str(tmp_path / "cache")


@pytest.mark.skipif(sys.platform != "linux", reason="the start in ticks is Linux's")
def test_a_change_of_the_clock_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil adds the time of the machine's start, which moves with the clock."""
    home = tmp_path / "copra-fl-live"
    home.mkdir()
    keeper = subprocess.Popen([sys.executable, guard.__file__, "mark", "sleep", "1000"], stdin=subprocess.PIPE)
    guard.write_record(home, keeper.pid, "mark")
    before = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: before + 3600)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: before + 3600)
    assert guard.is_guarded(json.loads((home / guard.RECORD).read_text()))
    guard.remove_leftovers(tmp_path, "copra-fl-")
    assert home.exists() and keeper.poll() is None
    assert keeper.stdin is not None
    keeper.stdin.close()
    assert keeper.wait(timeout=HANG_SECONDS) == 0
    assert not guard.is_guarded(json.loads((home / guard.RECORD).read_text()))


def test_the_next_command_removes_what_a_killed_guard_has_left(tmp_path: Path) -> None:
    """The processes carry the mark, or name the folder as Ray's agents do; a live guard's folder is left alone."""

    def start(name: str, mark: str) -> tuple[Path, subprocess.Popen[bytes], psutil.Process]:
        home = tmp_path / f"copra-fl-{name}"
        home.mkdir()
        agent = f"env -i bash -c 'exec -a {home}/agent sleep 1000'"
        child = f"({agent} & echo $! > {home}/pid); exec sleep 1000"
        command = [sys.executable, guard.__file__, mark, "bash", "-c", child]
        keeper = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {guard.VARIABLE: mark})
        guard.write_record(home, keeper.pid, mark)
        RealRun.wait_until(lambda: (home / "pid").exists() and (home / "pid").read_text().strip() != "", "the child")
        return home, keeper, psutil.Process(int((home / "pid").read_text()))

    dead_home, dead, orphan = start("dead", "dead-mark")
    live_home, live, child = start("live", "live-mark")
    children = psutil.Process(dead.pid).children(recursive=True)
    dead.kill()
    dead.wait()
    guard.remove_leftovers(tmp_path, "copra-fl-")
    assert not dead_home.exists() and live_home.exists()
    gone = {process for process in (*children, orphan) if not process.is_running()}
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in {*children, orphan} - gone)
    assert child.is_running()
    live.communicate()
