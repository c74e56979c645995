"""Runs a command and its whole offspring no longer than its owner lives.

    python guard.py MARK COMMAND...

The owner holds our standard input open. When it closes (the owner is done, was stopped
with Ctrl-C, or killed), or the command ends, every process whose environment carries
COPRA_FL_MARK=MARK is ended: SuperLink, server app, Ray and its workers.
"""

import os
import select
import subprocess
import sys

import psutil

VARIABLE = "COPRA_FL_MARK"
GRACE_SECONDS = 2


def marked(mark: str) -> list[psutil.Process]:
    """Every process but this one whose environment carries the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def main(mark: str, command: list[str]) -> None:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    owner_lives = True
    while owner_lives and child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.5)
        owner_lives = not readable
    child.terminate()
    _, alive = psutil.wait_procs(marked(mark), timeout=GRACE_SECONDS)
    while alive:
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=GRACE_SECONDS)
        alive = marked(mark)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
