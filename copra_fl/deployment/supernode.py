"""The command of a client's container: `flower-supernode` in this process, with logs in the format of COPRA_FL_LOG.

python -m copra_fl.deployment.supernode [FLOWER-SUPERNODE-ARGS...]
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import uvicorn

from copra_fl import logs


def main() -> None:
    (entry_point,) = entry_points(group="console_scripts", name="flower-supernode")
    run = entry_point.load()
    logs.configure()
    if logs.as_json():
        uvicorn.config.LOGGING_CONFIG["formatters"] |= dict.fromkeys(("default", "access"), {"()": logs.JsonFormatter})
    sys.argv[0] = "flower-supernode"
    run()


if __name__ == "__main__":
    main()
