"""Run a command, and kill it with all its descendants when the process that started the guard ends.

    python guard.py MARK COMMAND...

The owner holds the guard's standard input open. When it closes (the owner is done, was stopped with Ctrl-C, or was
killed), or when the command ends, the guard kills every process that descends from it or has COPRA_FL_MARK=MARK in
its environment: SuperLink, server app, Ray and its workers. They get SIGKILL at once: a run's results are written
atomically, and everything else lies in a folder that is removed. Ray's agents overwrite their environment, so on
Linux the guard adopts orphans, which makes them its descendants.
"""

import ctypes
import os
import select
import subprocess
import sys
from contextlib import suppress

import psutil

VARIABLE = "COPRA_FL_MARK"
PR_SET_CHILD_SUBREAPER = 36


def marked_processes(mark: str) -> set[psutil.Process]:
    """Return every process that descends from this one or carries the mark."""
    processes = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                processes.add(process)
    return processes


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
