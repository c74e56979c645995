"""Flower's SuperLink in this process, behind the API gate, and the SuperExec that starts its apps.

Flower's `--isolation=process` lets this module start `flower-superexec` itself, with the operator's secret, so that
nobody else can acquire the tasks of a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import uvicorn

from copra_fl import logs
from copra_fl.deployment import operator_secret
from copra_fl.deployment.api_gate import AdmitNode, ApiGate
from copra_fl.deployment.registration import flower_home

#: Proxy headers would let a caller claim any address; without them its address is that of its connection. Of uvicorn's
#: parsers of HTTP, only h11 bounds the headers of a request (64 kB). Flower has no WebSockets.
SERVER_SETTINGS: dict[str, Any] = {"proxy_headers": False, "http": "h11", "ws": "none"}


def run(
    flower_arguments: Sequence[str], admit_node: AdmitNode, before_serving: Callable[[], None] = lambda: None
) -> None:
    """Run `flower-superlink` with `flower_arguments` until it ends; FLWR_HOME must be its own.

    It calls uvicorn.run once, which this function replaces for the rest of the process. `before_serving` is called
    just before the SuperLink answers, after the logs of this process have been set up.
    """
    home = flower_home()
    serve, secret = uvicorn.run, operator_secret.make(home)
    secret_file = f"--superexec-auth-secret-file={home / operator_secret.NAME}"

    def serve_behind_gate(app: Any, **settings: Any) -> None:
        if logs.as_json():
            settings["log_config"]["formatters"] |= {"http": {"()": logs.JsonFormatter}}
        before_serving()
        with _superexec(settings["port"], secret_file, flower_arguments):
            serve(ApiGate(app, secret, admit_node), **settings | SERVER_SETTINGS)

    uvicorn.run = serve_behind_gate
    (entry_point,) = entry_points(group="console_scripts", name="flower-superlink")
    sys.argv = ["flower-superlink", *flower_arguments, "--isolation=process", secret_file]
    flower_superlink = entry_point.load()
    logs.configure()
    flower_superlink()


@contextmanager
def _superexec(port: int, secret_file: str, flower_arguments: Sequence[str]) -> Iterator[None]:
    """Run `flower-superexec` for the SuperLink on `port` during the block; it also ends with this process."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--ssl-ca-certfile")
    options, _ = parser.parse_known_args(flower_arguments)
    trust = "--insecure" if options.insecure else f"--root-certificates={options.ssl_ca_certfile}"
    command = [str(Path(sys.executable).parent / "flower-superexec"), f"--runtime-api-address=127.0.0.1:{port}"]
    command += [f"--parent-pid={os.getpid()}", secret_file, trust]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait()
