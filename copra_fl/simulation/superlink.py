"""Run the Flower app on this machine: a private SuperLink in simulation mode, Ray underneath.

Flower's own path, with its traps closed (each found by running it): an own FLWR_HOME and a
free port, so that no other run is touched; an empty working directory, since Ray's workers
import from the directory where the SuperLink starts; no dependency installation, telemetry
or update check; the outcome is the server app's own last word (an event), since `flwr run
--stream` exits 0 when a run has failed. A guard process ends everything when we end, however
we end.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import copra_fl
from copra_fl import events
from copra_fl.config import Value, toml_value
from copra_fl.simulation import guard

START_SECONDS = 300
MAX_DEFAULT_WORKERS = 4
#: Ray's variable for the niceness of workers
NICENESS = "RAY_worker_niceness"
#: where the app lies below a SuperLink's home
APP = "app"
#: variables that all workers of a run have alike
SHARED = ("COPRA_FL_CACHE", "COPRA_FL_LOG")


class RunFailed(RuntimeError):
    """A run that did not complete, in words for people."""


def app_directory() -> Path:
    """The Flower app: carried inside an installed copy, else the checkout."""
    package = Path(copra_fl.__file__).parent
    carried = package / "_app"
    return carried if carried.exists() else package.parent


def copy_app(directory: Path) -> None:
    """The app alone: `flwr run` looks at every file below the folder it is given, a checkout's .venv and runs too."""
    for name in ("clients", "server"):
        shutil.copytree(app_directory() / name, directory / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(app_directory() / name, directory / name)


@dataclass(frozen=True)
class Workers:
    """How a simulation is spread: Ray actors, each with a share of a machine's cores and GPUs.

    Attributes:
        nodes: Flower's nodes, which host the clients; the actors serve them.
        starts_ray: on this machine for this run alone; else Ray runs already.
    """

    number: int
    cpus: int
    gpus: float
    nodes: int
    starts_ray: bool = True

    @classmethod
    def share(cls, number: int | None, num_clients: int, gpus_per_worker: float | None = None) -> Workers:
        """This machine's cores dealt out evenly, and GPUs too unless their share is given; one node a worker.

        Without a `number` there is one per core and at most 4; never more than clients.
        """
        number = min(number or min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1), num_clients)
        if gpus_per_worker is None:
            gpus_per_worker = num_gpus() / number
        return cls(number, max(1, (os.cpu_count() or 1) // number), gpus_per_worker, nodes=number)

    def federation_config(self) -> str:
        """Flower's federation config."""
        config = (
            f"num-supernodes={self.nodes} client-resources-num-cpus={self.cpus} client-resources-num-gpus={self.gpus}"
        )
        return f"{config} init-args-num-cpus={self.number * self.cpus}" if self.starts_ray else config


@dataclass(frozen=True)
class SuperLink:
    """A private local SuperLink: where it lives, its process, and the environment to talk to it."""

    home: Path
    environment: dict[str, str]
    port: int
    keeper: subprocess.Popen[bytes]
    log: Path

    def flwr(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).parent / "flwr"), *arguments]

    def start_run(
        self, run_config: Mapping[str, Value], workers: Workers, copy: Callable[[Path], object] = copy_app
    ) -> subprocess.Popen[bytes]:
        """Submit the app that `copy` puts into a new folder; the process returned ends with the run.

        It writes its log to `log`. Raises RunFailed if the SuperLink does not start.
        """
        app, config = self.home / APP, self.home / "run-config.toml"
        copy(app)
        config.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in run_config.items()), "utf-8")
        command = self.flwr("run", str(app), "local", "--stream", "--run-config", str(config))
        command += ["--federation-config", workers.federation_config()]
        with open(self.log, "ab") as log:
            self._wait_until_healthy()
            return subprocess.Popen(
                command, env=self.environment, cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def status(self) -> str:
        """Flower's word on the last run, like ``finished:failed``."""
        command = self.flwr("list", "local", "--format", "json")
        output = subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True).stdout
        try:
            runs: list[dict[str, Any]] = json.loads(output)["runs"]
        except (ValueError, KeyError):
            return "unknown"
        return str(runs[0]["status"]) if runs else "never started"

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.keeper.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise RunFailed(f"Flower's SuperLink did not start within {START_SECONDS} s; its log is {self.log}")


def worker_variables() -> dict[str, str]:
    """What workers on other machines are to have of our environment."""
    return {"TOKENIZERS_PARALLELISM": "false"} | {name: os.environ[name] for name in SHARED if name in os.environ}


def ray_variables(home: Path, address: str | None) -> dict[str, str]:
    """The environment in which Flower starts a Ray of its own, whatever else runs here, or joins that at `address`.

    Workers of a Ray of its own have the priority of the command that was started, unless RAY_worker_niceness says
    otherwise: with Ray's default of 15, anything else that runs on the machine would starve them, and to simulate is
    what the user asked of it. In a cluster that is up to those who started it.
    On another machine there are no `clients`, which lie in `home`: Ray brings them, as its job submission would.
    """
    if address is None:
        return {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(home), NICENESS: os.environ.get(NICENESS, "0")}
    brought = {"py_modules": [str(home / APP / "clients")], "env_vars": worker_variables()}
    return {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": brought})}


@contextmanager
def superlink(log: Path, ray_address: str | None = None) -> Iterator[SuperLink]:
    """A SuperLink for the duration of the block; afterwards no process and no file of it is left.

    Simulations run on the Ray cluster at `ray_address`, else on a Ray of their own.
    It starts in the background: `start_run` waits for it. `log`, if a run was started, takes what server app and
    workers print, and at the end what the SuperLink printed.
    """
    # Ray's sockets lie below it, and a socket's path must be short, which TMPDIR may not be.
    home = Path(tempfile.mkdtemp(prefix="copra-fl-", dir="/tmp" if os.path.isdir("/tmp") else None))
    mark = uuid.uuid4().hex
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    empty = home / "empty"
    empty.mkdir()
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {
        guard.VARIABLE: mark,
        events.VARIABLE: str(home / "events.jsonl"),
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # workers that no actor would ever use
        **worker_variables(),
        **ray_variables(home, ray_address),
    }
    command = [sys.executable, guard.__file__, mark, f"{scripts}/flower-superlink", "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    own_log = home / "superlink.log"
    with open(own_log, "wb") as output:
        keeper = subprocess.Popen(
            command, env=environment, cwd=empty, stdin=subprocess.PIPE, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield SuperLink(home, environment, port, keeper, log)
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()
        if log.exists():
            with open(log, "ab") as output:
                output.write(own_log.read_bytes())
        shutil.rmtree(home, ignore_errors=True)


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
