"""Disks that are read-only or full: small file systems in memory, which only root can mount."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.command_line import run_command
from tests.support.real_runs import RealRun, num_rounds, settings
from tests.support.run_folders import write_run
from tests.support.tiny import Settings

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts an empty tmpfs with options such as ``size=1m``; skip where that is not allowed."""
    with ExitStack() as stack:

        def mount(options: str) -> Path:
            folder = tmp_path / "disk"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"cannot mount a file system: {done.stderr.strip()}")
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            return folder

        yield mount


def fill(disk: Path) -> Path:
    """Fill the file system of `disk` to its last byte; return the file to delete."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def test_a_report_on_a_full_disk_is_one_line_and_leaves_no_temporary_file(mount: Mount) -> None:
    disk = mount("size=1m")
    run = disk / "run"
    write_run(run, "lora", 0)
    filler, before = fill(disk), sorted(run.iterdir())
    message = run_command("report", run, code=1).message
    reason = f"the disk of {run / 'report.html'} is full; free some space, then repeat the command"
    assert message == f"copra-fl: {reason}" and sorted(run.iterdir()) == before
    filler.unlink()


@pytest.mark.slow
def test_a_read_only_disk_is_named_before_anything_starts(tiny: Settings, mount: Mount, tmp_path: Path) -> None:
    disk = mount("ro")
    run = RealRun(["simulate", *settings(tiny), "--workers", "1", "--output", str(disk / "run")], tmp_path)
    _, err = run.finish(code=2)
    assert err.splitlines() == [f"copra-fl: --output {disk / 'run'}: cannot write in {disk}: Read-only file system"]


@pytest.mark.slow
@pytest.mark.parametrize("free_kb", [8, 100], ids=["before round 1", "at a checkpoint"])
def test_a_run_on_a_full_disk_says_so_and_continues_once_there_is_space(
    tiny: Settings, mount: Mount, tmp_path: Path, free_kb: int
) -> None:
    disk = mount("size=8m")
    filler = fill(disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 1024 * free_kb)
    arguments = ["simulate", *settings(tiny), "--workers", "1", "--output", str(disk / "run")]
    _, err = RealRun(arguments, tmp_path).finish(code=1)
    last = [line for line in err.splitlines() if "is full" in line]
    assert len(last) == 1 and last[0].endswith("is full; free some space, then repeat the command"), err
    assert "Traceback" not in err
    filler.unlink()
    RealRun([*arguments, "--resume"], tmp_path).finish()
    assert num_rounds(disk / "run") == 2
