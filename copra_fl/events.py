"""Events of a run while it goes on, from which the command line draws its progress.

The processes of a run (server app, workers) append one JSON object per line to the file that the environment variable
COPRA_FL_EVENTS names. Without the variable nothing is written.
"""

from __future__ import annotations

import json
import os

VARIABLE = "COPRA_FL_EVENTS"


def emit(event: str, **fields: str | int | float | None) -> None:
    """Append one event in a single small write, so that lines of several processes do not mix."""
    path = os.environ.get(VARIABLE)
    if path:
        line = json.dumps({"event": event, **fields}) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
