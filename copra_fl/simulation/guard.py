"""Runs a command and its whole offspring no longer than its owner lives.

    python guard.py MARK COMMAND...

The owner holds our standard input open. When it closes (the owner is done, was stopped
with Ctrl-C, or killed), or the command ends, everything is killed that descends from us or
whose environment carries COPRA_FL_MARK=MARK: SuperLink, server app, Ray and its workers.
None is asked first: what a run keeps is written atomically, all else lies in a folder that
is removed. Ray's agents write over their environment; on Linux we adopt the orphans.
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


def family(mark: str) -> set[psutil.Process]:
    """Every process that descends from this one or carries the mark."""
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                found.add(process)
    return found


def main(mark: str, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    owner_lives = True
    while owner_lives and child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.5)
        owner_lives = not readable
    while alive := family(mark):
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
