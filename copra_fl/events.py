"""What happens in a run, as it happens: lines that the command line draws its progress from.

The processes of a run (server app, workers) append JSON lines to the file that the
environment variable COPRA_FL_EVENTS names; without it nothing is written.
"""

from __future__ import annotations

import json
import os

VARIABLE = "COPRA_FL_EVENTS"


def emit(event: str, **fields: str | int | float | None) -> None:
    """Append one event. A line is one small write, so that processes do not mix theirs."""
    path = os.environ.get(VARIABLE)
    if path:
        line = json.dumps({"event": event, **fields}) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
