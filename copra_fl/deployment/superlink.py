"""The command of the server's container: Flower's SuperLink behind the API gate, with registered nodes.

    python -m copra_fl.deployment.superlink [--nodes=FOLDER] [--metrics-port=PORT] [--runs=FOLDER]
        [FLOWER-SUPERLINK-ARGS...]

It runs `flower-superlink` in this process, with these additions:

- All its APIs are served through `ApiGate`.
- --nodes: once the SuperLink answers, the public keys in FOLDER are registered, and keys that disappear from FOLDER
  are unregistered. Without it, anyone may connect as a node (`deploy init --insecure`).
- --metrics-port: metrics for Prometheus are served on PORT; those of runs come from the folder --runs.
- The server app appends to the audit log in the folder --runs.
- Logs have the format of COPRA_FL_LOG, and include the logs of ServerApps.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import uvicorn

from copra_fl import logs
from copra_fl.deployment.api_gate import ApiGate
from copra_fl.deployment.layout import AUDIT
from copra_fl.deployment.registration import keep_registered
from copra_fl.records.audit import VARIABLE


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=Path)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--runs", type=Path, default=Path("/runs"))
    options, flower_arguments = parser.parse_known_args()
    serve = uvicorn.run

    def serve_behind_gate(app: Any, **settings: Any) -> None:
        ready = threading.Event()
        if options.nodes:
            threading.Thread(target=keep_registered, args=(options.nodes, ready), daemon=True).start()
        else:
            ready.set()
        if logs.as_json():
            settings["log_config"]["formatters"] |= {"http": {"()": logs.JsonFormatter}}
        # Proxy headers would let a caller claim any address; without them its address is that of its connection.
        serve(ApiGate(app, ready), proxy_headers=False, **settings)

    uvicorn.run = serve_behind_gate
    (entry_point,) = entry_points(group="console_scripts", name="flower-superlink")
    sys.argv = ["flower-superlink", *flower_arguments]
    run = entry_point.load()
    logs.configure()
    if sys.platform == "linux":
        os.environ[logs.COPY_VARIABLE] = f"/proc/{os.getpid()}/fd/{sys.stderr.fileno()}"
    os.environ[VARIABLE] = str(options.runs / AUDIT)
    if options.metrics_port:
        from copra_fl.deployment import metrics  # slow to import

        metrics.serve(options.metrics_port, options.runs)
    run()


if __name__ == "__main__":
    main()
