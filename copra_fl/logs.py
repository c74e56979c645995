"""Log configuration: with COPRA_FL_LOG=json a process writes one JSON object per line, Flower's messages included.

Without it, Flower's text logs, plus copra_fl's with the prefix "copra-fl:".
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

VARIABLE = "COPRA_FL_LOG"
#: names a file that the process logs to as well: the output of a ServerApp reaches `flwr log` only, not its container
COPY_VARIABLE = "COPRA_FL_LOG_COPY"
#: attributes of every record; all others were given as ``extra`` and become fields of the JSON object
STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Format a record as one line: time (UTC), level, logger, process, message, ``extra`` fields, and exception."""

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
    """Return True if the user asks for JSON logs."""
    return os.environ.get(VARIABLE) == "json"


def configure() -> None:
    """Set up the loggers of this process. Call it after Flower is imported, which gives its logger a handler."""
    library_log, flower_log = logging.getLogger("copra_fl"), logging.getLogger("flwr")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if COPY_VARIABLE in os.environ:
        handlers.append(logging.FileHandler(os.environ[COPY_VARIABLE], encoding="utf-8"))
    for handler in handlers:
        handler.setLevel(logging.INFO)
        handler.setFormatter(JsonFormatter() if as_json() else logging.Formatter("copra-fl: %(message)s"))
    library_log.setLevel(logging.INFO)
    library_log.handlers = handlers
    flower_log.handlers = handlers if as_json() else [*flower_log.handlers, *handlers[1:]]
