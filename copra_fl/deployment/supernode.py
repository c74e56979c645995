"""The command of a client's container: `flower-supernode` in this process, with logs in the format of COPRA_FL_LOG.

python -m copra_fl.deployment.supernode [--hide-keys] [FLOWER-SUPERNODE-ARGS...]

With --hide-keys, ClientApps cannot read the node's private key. For containers (`hidden_keys.deny_reading`).
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import uvicorn

from copra_fl import logs
from copra_fl.deployment.hidden_keys import hide


def main() -> None:
    arguments = sys.argv[1:]
    if "--hide-keys" in arguments:
        arguments.remove("--hide-keys")
        arguments = hide(arguments, "--auth-supernode-private-key")
    (entry_point,) = entry_points(group="console_scripts", name="flower-supernode")
    run = entry_point.load()
    logs.configure()
    if logs.as_json():
        uvicorn.config.LOGGING_CONFIG["formatters"] |= dict.fromkeys(("default", "access"), {"()": logs.JsonFormatter})
    sys.argv = ["flower-supernode", *arguments]
    run()


if __name__ == "__main__":
    main()
