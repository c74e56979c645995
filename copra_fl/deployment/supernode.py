"""What a client's container runs: `flower-supernode` in this very process, which logs as COPRA_FL_LOG says.

python -m copra_fl.deployment.supernode WHAT flower-supernode IS TOLD...
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import uvicorn

from copra_fl import logs


def main() -> None:
    (supernode,) = entry_points(group="console_scripts", name="flower-supernode")
    run = supernode.load()
    logs.configure()
    if logs.as_json():
        uvicorn.config.LOGGING_CONFIG["formatters"] |= dict.fromkeys(("default", "access"), {"()": logs.JsonFormatter})
    sys.argv[0] = "flower-supernode"
    run()


if __name__ == "__main__":
    main()
