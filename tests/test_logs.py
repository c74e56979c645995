"""Logs of a process, as JSON and as text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime

PROGRAM = """
from logging import INFO
from flwr.supercore.logger import log
from copra_fl import logs
logs.configure()
log(INFO, "round %s: it's \\"done\\"\\nand more", 3, extra={"round": 3, "missing": [{"client": 1}]})
try:
    1 / 0
except ZeroDivisionError:
    log(40, "broken", exc_info=True)
import logging
logging.getLogger("copra_fl.deployment.registration").info("registering client-0: done")
"""


def printed(**environment: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert not process.stdout
    return process.stderr.splitlines()


def test_json_logs_have_one_object_per_line() -> None:
    first, broken, library = (json.loads(line) for line in printed(COPRA_FL_LOG="json"))
    assert first["message"] == 'round 3: it\'s "done"\nand more'
    assert (first["level"], first["logger"], first["round"], first["missing"]) == ("INFO", "flwr", 3, [{"client": 1}])
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 60
    assert broken["level"] == "ERROR" and "ZeroDivisionError" in broken["exception"]
    assert library["logger"] == "copra_fl.deployment.registration"


def test_text_logs_are_flower_s_and_copra_fl_s() -> None:
    lines = printed()
    assert lines[-1] == "copra-fl: registering client-0: done"
    assert "INFO" in lines[0] and not lines[0].startswith("{")
