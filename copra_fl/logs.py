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
    handler, ours = logging.StreamHandler(), logging.getLogger("copra_fl")
    handler.setLevel(logging.INFO)
    handler.setFormatter(JsonFormatter() if as_json() else logging.Formatter("copra-fl: %(message)s"))
    ours.setLevel(logging.INFO)
    ours.handlers = [handler]
    if as_json():
        logging.getLogger("flwr").handlers = [handler]
