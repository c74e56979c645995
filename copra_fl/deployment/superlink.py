"""What the server's container runs: Flower's SuperLink behind the gate, knowing the nodes whose keys lie in a folder.

    python -m copra_fl.deployment.superlink --nodes=FOLDER --metrics-port=PORT WHAT flower-superlink IS TOLD...

It is `flower-superlink` in this very process, with additions. What it serves goes through the `Gate`. Once it
answers, the public keys in FOLDER are registered and those that are gone from it unregistered; without --nodes whoever
connects is a node (`deploy init --insecure`). With --metrics-port Prometheus can ask there how it goes. And it logs as
COPRA_FL_LOG says; what ServerApps log is there too.
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
from copra_fl.deployment.api_gate import Gate
from copra_fl.deployment.registration import keep_registered


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=Path)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--runs", type=Path, default=Path("/runs"))
    ours, flowers = parser.parse_known_args()
    serve = uvicorn.run

    def serve_gated(app: Any, **settings: Any) -> None:
        ready = threading.Event()
        if ours.nodes:
            threading.Thread(target=keep_registered, args=(ours.nodes, ready), daemon=True).start()
        else:
            ready.set()
        if logs.as_json():
            settings["log_config"]["formatters"] |= {"http": {"()": logs.JsonFormatter}}
        # Without proxy headers a caller's address is that of its connection, whatever it claims.
        serve(Gate(app, ready), proxy_headers=False, **settings)

    uvicorn.run = serve_gated
    (superlink,) = entry_points(group="console_scripts", name="flower-superlink")
    sys.argv = ["flower-superlink", *flowers]
    run = superlink.load()
    logs.configure()
    if sys.platform == "linux":
        os.environ[logs.BESIDE] = f"/proc/{os.getpid()}/fd/{sys.stderr.fileno()}"
    if ours.metrics_port:
        from copra_fl.deployment import metrics  # slow to import

        metrics.serve(ours.metrics_port, ours.runs)
    run()


if __name__ == "__main__":
    main()
