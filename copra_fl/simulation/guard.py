"""Run a command, and kill it with all its descendants when the process that started the guard ends.

    python guard.py MARK COMMAND...

The owner holds the guard's standard input open. When it closes (the owner is done, was stopped with Ctrl-C, or was
killed), or when the command ends, the guard kills every process that descends from it or has COPRA_FL_MARK=MARK in
its environment: SuperLink, server app, Ray and its workers. They get SIGKILL at once: a run's results are written
atomically, and everything else lies in a folder that is removed. Ray's agents overwrite their environment, so on
Linux the guard adopts orphans, which makes them its descendants. If the guard itself is killed, the next command kills
what is left and removes its folder (`remove_leftovers`).
"""

import ctypes
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

VARIABLE = "COPRA_FL_MARK"
#: file in the folder of a run that names its guard
RECORD = "guard.json"
PR_SET_CHILD_SUBREAPER = 36
#: seconds after which processes that cannot be killed are left alone
KILL_SECONDS = 30


def marked_processes(mark: str) -> set[psutil.Process]:
    """Return every process that descends from this one or carries the mark."""
    processes = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                processes.add(process)
    return processes


def write_record(home: Path, guard: int, mark: str) -> None:
    """Write to the run's folder `home` which process guards it."""
    facts = {"pid": guard, "start": start_of(guard), "mark": mark}
    (home / RECORD).write_text(json.dumps(facts), encoding="utf-8")


def start_of(pid: int) -> str:
    """Return when the process `pid` started; on Linux in ticks since the machine's start, as the clock can be set.

    Raises OSError or psutil.Error if there is no such process.
    """
    if sys.platform != "linux":
        return str(psutil.Process(pid).create_time())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()  # from the third of proc(5) on
    return f"{boot} {fields[19]}"


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Kill the processes and remove the folders of this user's runs below `parent` whose guards are gone.

    `prefix` begins the names of the runs' folders. Ray's agents do not carry the mark; their commands name the folder.
    """
    for record in parent.glob(f"{prefix}*/{RECORD}"):
        with suppress(OSError, ValueError, KeyError):
            if record.stat().st_uid == os.getuid() and not is_guarded(facts := json.loads(record.read_text("utf-8"))):
                kill_marked(facts["mark"], record.parent)
                shutil.rmtree(record.parent, ignore_errors=True)


def is_guarded(facts: dict[str, Any]) -> bool:
    """Return whether the process in a record still runs; its id may belong to another one by now."""
    start = facts["start"]
    with suppress(psutil.Error, OSError):
        return start_of(facts["pid"]) == start
    return False


def kill_marked(mark: str, home: Path) -> None:
    """Kill all processes with `mark` in their environment or the folder `home` in their command."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        alive = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(VARIABLE) == mark or any(str(home) in word for word in process.cmdline()):
                    process.kill()
                    alive.append(process)
        if not alive:
            return
        psutil.wait_procs(alive, timeout=1)


def main(mark: str, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    owner_lives = True
    while owner_lives and child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.5)
        owner_lives = not readable
    while alive := marked_processes(mark):
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
