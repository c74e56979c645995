"""Run the Flower app in a private SuperLink in simulation mode, with Ray underneath.

It uses Flower's own commands and avoids their pitfalls:

- A FLWR_HOME and a free port of its own, so that it touches no other run.
- Other users of the machine reach the port, so it answers only this one (`private_superlink`).
- An empty working directory, because Ray's workers import from the directory where the SuperLink starts.
- No dependency installation, telemetry or update check.
- The server app reports the outcome in its last event, because `flwr run --stream` exits with 0 after a failed run.
- A guard process kills all processes of the run when this process ends in any way.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from copra_fl import events, plugins, startup
from copra_fl.config import Config, Value, toml_value
from copra_fl.files import cache_dir
from copra_fl.simulation import guard

START_SECONDS = 300
MAX_DEFAULT_WORKERS = 4
#: Ray counts fractions of a GPU in 1 / GPU_UNITS
GPU_UNITS = 10_000
#: Ray's variable for the niceness of workers
NICENESS = "RAY_worker_niceness"
#: begins the names of the folders of simulations below /tmp
PREFIX = "copra-fl-"
#: folder of the app in a SuperLink's home
APP = "app"
#: file in a SuperLink's home with its output
SUPERLINK_LOG = "superlink.log"


class RunFailed(RuntimeError):
    """A run that did not complete. The message is for the user."""


def app_directory() -> Path:
    """Return the folder with the Flower app: inside the package if it is installed, else the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_app"
    return installed if installed.exists() else package.parent


def copy_app(directory: Path) -> None:
    """Copy only the app to `directory`: `flwr run` reads every file in the app's folder, even .venv in a checkout."""
    for name in ("clients", "server"):
        shutil.copytree(app_directory() / name, directory / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(app_directory() / name, directory / name)


@dataclass(frozen=True)
class Workers:
    """Number and size of a simulation's workers, which are Ray actors.

    Attributes:
        cpus: cores per worker.
        gpus: GPUs per worker; may be a fraction.
        nodes: number of Flower's nodes, which host the clients and are served by the workers.
        starts_ray: True if Ray is started on this machine for this run; False if a Ray cluster runs already.
    """

    number: int
    cpus: int
    gpus: float
    nodes: int
    starts_ray: bool = True

    @classmethod
    def share(cls, number: int | None, num_clients: int, gpus_per_worker: float | None = None) -> Workers:
        """Divide this machine's cores evenly among workers, and its GPUs unless `gpus_per_worker` is given.

        A worker gets whole GPUs, or a part of one that all of them fit with. Without a `number` there is one worker per
        core, at most 4, and no more than have room on the GPUs. There are never more workers than clients.
        """
        cores, gpus = os.cpu_count() or 1, num_gpus()
        most = min(MAX_DEFAULT_WORKERS, cores)
        if gpus_per_worker:
            most = min(most, room_for(gpus_per_worker, gpus))
        number = min(number or most, num_clients)
        share = even_gpu_share(gpus, number) if gpus_per_worker is None else round_gpu_share(gpus_per_worker)
        return cls(number, max(1, cores // number), share, nodes=number)

    def federation_config(self) -> str:
        """Return the argument of ``flwr run --federation-config``."""
        config = (
            f"num-supernodes={self.nodes} client-resources-num-cpus={self.cpus} client-resources-num-gpus={self.gpus}"
        )
        return f"{config} init-args-num-cpus={self.number * self.cpus}" if self.starts_ray else config


@dataclass(frozen=True)
class SuperLink:
    """A private local SuperLink.

    Attributes:
        home: its folder, FLWR_HOME.
        environment: environment of the commands that talk to it.
        guard: the process that runs it, see `copra_fl.simulation.guard`.
        submitter: the process that will submit the run, see `copra_fl.simulation.waiting_flwr`.
        log: log file of server app and workers.
    """

    home: Path
    environment: dict[str, str]
    port: int
    guard: subprocess.Popen[bytes]
    submitter: subprocess.Popen[bytes]
    log: Path

    @property
    def superlink_log(self) -> Path:
        """Log file of the SuperLink itself, which has the reason why it rejects a run."""
        return self.home / SUPERLINK_LOG

    def flwr(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).parent / "flwr"), *arguments]

    def start_run(
        self, run_config: Mapping[str, Value], workers: Workers, copy: Callable[[Path], object] = copy_app
    ) -> subprocess.Popen[bytes]:
        """Submit the app that `copy` copies into a new folder, once; the returned process ends with the run.

        Server app and workers write to `log`. Raises RunFailed if the SuperLink does not start.
        """
        app, config = self.home / APP, self.home / "run-config.toml"
        copy(app)
        config.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in run_config.items()), "utf-8")
        arguments = ["run", str(app), "local", "--stream", "--run-config", str(config)]
        arguments += ["--federation-config", workers.federation_config()]
        self.log.touch()
        self._wait_until_healthy()
        assert self.submitter.stdin is not None
        with suppress(BrokenPipeError), self.submitter.stdin as channel:  # if it has ended, the caller sees that
            channel.write(json.dumps([arguments, str(self.log)]).encode() + b"\n")
        return self.submitter

    def status(self) -> str:
        """Return Flower's status of the last run, like ``finished:failed``."""
        command = self.flwr("list", "local", "--format", "json")
        output = subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True).stdout
        try:
            runs: list[dict[str, Any]] = json.loads(output)["runs"]
        except (ValueError, KeyError):
            return "unknown"
        return str(runs[0]["status"]) if runs else "never started"

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.guard.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        ended = f"ended at once (exit code {code})" if (code := self.guard.poll()) is not None else "does not answer"
        output = self.superlink_log.read_text(encoding="utf-8", errors="replace").strip()
        raise RunFailed(
            f"Flower's SuperLink {ended}: {output.splitlines()[-1] if output else 'it has written nothing'}\n"
            f"Flower's log: {self.log}"
        )


def worker_variables() -> dict[str, str]:
    """Return the environment variables that workers on all machines get."""
    variables = {"TOKENIZERS_PARALLELISM": "false"}
    if "COPRA_FL_LOG" in os.environ:
        variables["COPRA_FL_LOG"] = os.environ["COPRA_FL_LOG"]
    if os.environ.get("COPRA_FL_CACHE"):
        variables["COPRA_FL_CACHE"] = str(cache_dir())  # absolute: the processes run in another folder
    return variables


def import_path(folders: Sequence[str]) -> str:
    """Return PYTHONPATH with `folders` at its end, and with absolute paths: the processes run in another folder."""
    known = [os.path.abspath(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return os.pathsep.join(dict.fromkeys([*known, *folders]))


def ray_variables(home: Path, address: str | None, configs: Collection[Config]) -> dict[str, str]:
    """Return the environment in which Flower starts its own Ray for runs of `configs`, or joins the cluster at
    `address`.

    Workers of its own Ray have the priority of the command, unless RAY_worker_niceness is set: with Ray's default of 15
    any other process on the machine would starve them, and the user asked for the simulation. They import the large
    modules while the server app does, before its first message, unless bitsandbytes is one of them: it initializes
    CUDA, and Ray sets CUDA_VISIBLE_DEVICES only later, so all workers would compute on the first GPU. Workers of a
    cluster have the priority that the cluster was started with. Other machines do not have the package `clients`, which
    lies in `home`: Ray uploads it, as for a submitted job.
    """
    if address is None:
        variables = {"RAY_ADDRESS": "local", "RAY_TMPDIR": str(home), NICENESS: os.environ.get(NICENESS, "0")}
        imports_early = startup.HIDDEN in startup.environment(configs)
        runtime_env: dict[str, Any] = {"worker_process_setup_hook": "copra_fl.startup.prepare"} if imports_early else {}
    else:
        variables = {"RAY_ADDRESS": address}
        runtime_env = {"py_modules": [str(home / APP / "clients")], "env_vars": worker_variables()}
    return variables | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": runtime_env})}


@contextmanager
def superlink(log: Path, configs: Collection[Config] = (), ray_address: str | None = None) -> Iterator[SuperLink]:
    """Run a SuperLink for the duration of the block; afterwards none of its processes and files are left.

    It is for runs of `configs`, on the Ray cluster at `ray_address`, else on a Ray started for them. Their processes
    import plugins from where this one does. The SuperLink starts in the background: `start_run` waits for it. If a run
    is started, `log` gets the output of server app and workers, and at the end that of the SuperLink.
    """
    # Ray's sockets lie in it, and the path of a socket must be short; TMPDIR may be long.
    temporary = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
    guard.remove_leftovers(Path(temporary), PREFIX)
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary))
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
        "PYTHONPATH": import_path(plugins.import_folders(configs)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # they would start workers that no actor uses
        **startup.environment(configs),
        **worker_variables(),
        **ray_variables(home, ray_address, configs),
    }
    command = [sys.executable, guard.__file__, mark, sys.executable, "-m", "copra_fl.simulation.private_superlink"]
    command += ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    superlink_log = home / SUPERLINK_LOG
    with open(superlink_log, "wb") as output:
        guard_process = subprocess.Popen(
            command, env=environment, cwd=empty, stdin=subprocess.PIPE, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        submitter = subprocess.Popen(
            [sys.executable, "-P", "-m", "copra_fl.simulation.waiting_flwr"], env=environment, cwd=home,
            stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    guard.write_record(home, guard_process.pid, mark)
    try:
        yield SuperLink(home, environment, port, guard_process, submitter, log)
    finally:
        for process in (submitter, guard_process):
            assert process.stdin is not None
            process.stdin.close()
        if guard_process.wait() < 0:  # killed, so it has ended nothing
            guard.kill_marked(mark, home)
        if log.exists():
            with open(log, "ab") as output:
                output.write(superlink_log.read_bytes())
        shutil.rmtree(home, ignore_errors=True)


def part_of_gpu(number: int) -> float:
    """Return the largest part of a GPU, in Ray's units, of which `number` fit on one."""
    return GPU_UNITS // number / GPU_UNITS


def even_gpu_share(gpus: int, number: int) -> float:
    """Return the largest share with which `number` workers fit on `gpus` GPUs; 0 without a GPU."""
    if not gpus:
        return 0.0
    return float(gpus // number) if gpus >= number else part_of_gpu(ceil(number / gpus))


def round_gpu_share(gpus: float) -> float:
    """Round `gpus` up to the largest share of which equally many fit on one GPU: a worker cannot use parts of two GPUs.

    Flower adds up all GPUs, and would wait for ever for the third of three workers with 0.6 GPUs on two GPUs.
    """
    return part_of_gpu(int(1 / gpus)) if 0 < gpus < 1 else float(ceil(gpus))


def room_for(gpus_per_worker: float, gpus: int) -> int:
    """Return how many workers with `gpus_per_worker` GPUs, not 0, fit on `gpus` GPUs."""
    return gpus * int(1 / gpus_per_worker) if gpus_per_worker < 1 else gpus // ceil(gpus_per_worker)


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
