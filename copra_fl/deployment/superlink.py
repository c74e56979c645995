"""The command of the server's container: Flower's SuperLink behind the API gate, with registered nodes.

    python -m copra_fl.deployment.superlink [--nodes=FOLDER] [--metrics-port=PORT] [--runs=FOLDER] [--hide-keys]
        [FLOWER-SUPERLINK-ARGS...]

It runs `flower-superlink` in this process, with these additions:

- All its APIs are served through `ApiGate`.
- --nodes: once the SuperLink answers, the public keys in FOLDER are registered, and nodes whose keys disappear from
  FOLDER are shut out. Without it, anyone may connect as a node (`deploy init --insecure`).
- FLWR_HOME gets a `flwr` connection to this SuperLink, for operators in its container.
- --metrics-port: metrics for Prometheus are served on PORT; those of runs come from the folder --runs.
- The server app appends to the audit log in the folder --runs.
- --hide-keys: ServerApps cannot read the server's private key. For containers (`hidden_keys.deny_reading`).
- Logs have the format of COPRA_FL_LOG, and include the logs of ServerApps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

from copra_fl import logs
from copra_fl.deployment import gated_superlink, registration
from copra_fl.deployment.api_gate import admit_every_node
from copra_fl.deployment.hidden_keys import hide
from copra_fl.deployment.layout import AUDIT
from copra_fl.deployment.node_keys import NodeKeys
from copra_fl.records import audit


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=Path)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--runs", type=Path, default=Path("/runs"))
    parser.add_argument("--hide-keys", action="store_true")
    options, flower_arguments = parser.parse_known_args()
    flower_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flower_parser.add_argument("--port", type=int, required=True)
    flower_parser.add_argument("--ssl-ca-certfile")
    flower_options, _ = flower_parser.parse_known_args(flower_arguments)
    ca = flower_options.ssl_ca_certfile
    registration.write_connection(registration.flower_home(), flower_options.port, ca)
    log_holder, log_descriptor = os.getpid(), sys.stderr.fileno()
    if options.hide_keys:
        flower_arguments = hide(flower_arguments, "--ssl-keyfile")
        # ServerApps cannot open the descriptors of this process any more.
        log_holder, log_descriptor = subprocess.Popen(["sleep", "infinity"], stderr=sys.stderr).pid, 2
    keys = NodeKeys()

    def before_serving() -> None:
        if sys.platform == "linux":
            os.environ[logs.COPY_VARIABLE] = f"/proc/{log_holder}/fd/{log_descriptor}"
        os.environ[audit.VARIABLE] = str(options.runs / AUDIT)
        if options.nodes:
            os.environ[registration.VARIABLE] = str(registration.flower_home())
            threading.Thread(target=registration.keep_registered, args=(options.nodes, keys), daemon=True).start()
        if options.metrics_port:
            from copra_fl.deployment import metrics  # slow to import

            metrics.serve(options.metrics_port, options.runs, Path(ca).parent if ca else None)

    gated_superlink.run(flower_arguments, keys.admit if options.nodes else admit_every_node, before_serving)


if __name__ == "__main__":
    main()
