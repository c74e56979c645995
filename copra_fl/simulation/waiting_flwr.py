"""The command `flwr`, imported before its arguments are known, because importing it takes a second.

    python -m copra_fl.simulation.waiting_flwr

It reads one line from its standard input: the arguments, and the file that it appends its output to, as JSON. It ends
without one when that closes.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points


def main() -> None:
    (entry_point,) = entry_points(group="console_scripts", name="flwr")
    flwr = entry_point.load()
    line = sys.stdin.readline()
    if not line:
        return
    arguments, log = json.loads(line)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    sys.argv = ["flwr", *arguments]
    flwr()


if __name__ == "__main__":
    main()
