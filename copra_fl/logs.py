"""Logs for machines: with COPRA_FL_LOG=json a process writes one JSON object a line, Flower's own messages too.

Without it Flower logs as it always does, and `copra_fl` beside it in plain words.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

VARIABLE = "COPRA_FL_LOG"
#: a file that the process logs to besides: a ServerApp's own output goes nowhere but to `flwr log`
BESIDE = "COPRA_FL_LOG_BESIDE"
#: what every record has; whatever else one has was given as ``extra``, and is a field of its own
STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line: time (UTC), level, logger, process, message, the fields in ``extra``, and the exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": Path(sys.argv[0]).name,
            "message": record.getMessage().strip(),
        } | {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def as_json() -> bool:
    return os.environ.get(VARIABLE) == "json"


def configure() -> None:
    """Set up what this process logs. Flower must have been imported: it gives its logger a handler then."""
    ours, flowers = logging.getLogger("copra_fl"), logging.getLogger("flwr")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if BESIDE in os.environ:
        handlers.append(logging.FileHandler(os.environ[BESIDE], encoding="utf-8"))
    for handler in handlers:
        handler.setLevel(logging.INFO)
        handler.setFormatter(JsonFormatter() if as_json() else logging.Formatter("copra-fl: %(message)s"))
    ours.setLevel(logging.INFO)
    ours.handlers = handlers
    flowers.handlers = handlers if as_json() else [*flowers.handlers, *handlers[1:]]
