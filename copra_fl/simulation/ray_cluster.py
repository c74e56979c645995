"""Workers of a simulation: on this machine, or on an existing Ray cluster (`--ray-address`).

Flower fills a whole cluster with workers of equal size and does not check that a machine can train. So every machine is
inspected before a run is submitted (`inspect_ray.py`): sources and versions, paths, cache, free cores and GPUs.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from copra_fl import provenance
from copra_fl.config import Config, ConfigError
from copra_fl.files import cache_dir
from copra_fl.simulation.superlink import (
    MAX_DEFAULT_WORKERS,
    Workers,
    part_of_gpu,
    round_gpu_share,
    worker_variables,
)

CONNECT_SECONDS = 5
#: limit for the inspection of all machines; Ray itself tries for nearly two minutes
INSPECT_SECONDS = 90


def check_address(address: str | None) -> str | None:
    """Return `address`. Raises ConfigError unless it is None, or HOST:PORT of a port that accepts connections."""
    if address is None:
        return None
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()) or "/" in host:
        raise ConfigError(f"--ray-address {address!r} is not HOST:PORT, like 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster answers there ({error}); `ray start --head` starts one and "
            "prints its address"
        ) from None
    return address


@dataclass(frozen=True)
class WorkerRequest:
    """Workers that the user asks for; `allocate` chooses what is None.

    Attributes:
        workers: number of workers.
        gpus_per_worker: GPUs per worker; may be a fraction.
        ray_address: address of a Ray cluster; None to start Ray on this machine.
    """

    workers: int | None
    gpus_per_worker: float | None
    ray_address: str | None

    def share(self, configs: Sequence[Config]) -> Workers:
        """Return the workers for runs of `configs` on this machine."""
        num_clients = max(config.data.num_clients for config in configs)
        return Workers.share(self.workers, num_clients, self.gpus_per_worker)

    def allocate(self, configs: Sequence[Config], console: Console) -> Workers:
        """Return the workers for runs of `configs`. Raises ConfigError if the cluster cannot train them."""
        if self.ray_address is None:
            return self.share(configs)
        num_clients = max(config.data.num_clients for config in configs)
        with console.status("inspecting the Ray cluster"):
            cluster = inspect_cluster(
                self.ray_address, sorted({path for config in configs for path in local_paths(config)})
            )
        check(cluster, configs)
        for note in version_notes(cluster):
            console.print(f"note: {note}", soft_wrap=True)
        workers = divide(cluster, self.workers, num_clients, self.gpus_per_worker)
        console.print(
            f"{workers.number} workers on a Ray cluster of {len(cluster.machines)} machines, {workers.cpus} cores and "
            f"{workers.gpus:g} GPUs per worker",
        )
        return workers


def local_paths(config: Config) -> list[str]:
    """Return the files and folders that a checked configuration names; `check` has made them absolute."""
    names = [*config.data.datasets, config.data.test_file, config.model.model, config.training.script]
    return [name for name in names if Path(name).is_absolute()]


@dataclass(frozen=True)
class Machine:
    """A machine with cores, as `inspect_ray.py` reports it.

    Attributes:
        digest: `provenance.source_digest` of its copra_fl.
        versions: its `provenance.versions`.
        missing: required paths that it does not have.
        shares_cache: True if its cache folder is the one of this machine.
        error: error of importing copra_fl there; empty if it can be imported.
    """

    address: str
    cpus: float
    gpus: float
    digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()
    shares_cache: bool = False
    error: str = ""

    def capacity(self, cpus: int, gpus: float) -> int:
        """Return the number of workers of this size that Flower starts here."""
        return int(min(self.cpus / cpus, self.gpus / gpus if gpus else inf))


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster and its free cores and GPUs."""

    address: str
    machines: tuple[Machine, ...]
    free_cpus: float
    free_gpus: float

    @property
    def cpus(self) -> float:
        return sum(machine.cpus for machine in self.machines)

    @property
    def gpus(self) -> float:
        return sum(machine.gpus for machine in self.machines)

    def capacity(self, cpus: int, gpus: float) -> int:
        """Return the number of workers of this size that Flower starts in the cluster."""
        return sum(machine.capacity(cpus, gpus) for machine in self.machines)


def inspect_cluster(address: str, paths: Sequence[str]) -> Cluster:
    """Inspect the cluster at `address` and the existence of `paths` on each machine.

    Raises ConfigError if this machine cannot join the cluster.
    """
    with tempfile.NamedTemporaryFile(dir=cache_dir(), prefix=".cluster-") as mark:
        question = {"address": address, "variables": worker_variables(), "paths": paths, "mark": Path(mark.name).name}
        try:
            answer = _run_inspection(question)
        except subprocess.TimeoutExpired:
            answer = {"error": f"no answer within {INSPECT_SECONDS} s"}
    if "error" in answer:
        raise ConfigError(f"--ray-address {address}: this machine cannot join a Ray cluster there: {answer['error']}")
    machines = tuple(Machine(**machine) for machine in answer["machines"])
    return Cluster(address, machines, answer["free_cpus"], answer["free_gpus"])


def _run_inspection(question: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("inspect_ray.py"))]
    process = subprocess.run(
        command, input=json.dumps(question), capture_output=True, text=True, timeout=INSPECT_SECONDS, check=False
    )
    try:
        return json.loads(process.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": process.stderr.strip() or f"exit code {process.returncode}"}


def check(cluster: Cluster, configs: Sequence[Config]) -> None:
    """Raise ConfigError unless the cluster is free and each of its machines can train any client of `configs`."""
    from copra_fl.training.plan import leaves_state

    digest, version = provenance.source_digest(Path(provenance.__file__).parent), provenance.versions()["flwr"]
    for machine in cluster.machines:
        name = f"machine {machine.address} of the Ray cluster"
        if machine.error:
            raise ConfigError(f"{name} cannot import copra_fl ({machine.error}); install copra-fl there")
        if machine.digest != digest:
            raise ConfigError(
                f"{name} has other sources of copra_fl (digest {machine.digest[:12]}) than this machine "
                f"({digest[:12]}); install the same version on all machines"
            )
        if machine.versions["flwr"] != version:
            raise ConfigError(
                f"{name} has flwr {machine.versions['flwr']}, this machine has {version}; install the same version on "
                "all machines"
            )
        if machine.missing:
            raise ConfigError(
                f"{name} does not have {', '.join(machine.missing)}; paths in dataset, test-file and model must exist "
                "on all machines"
            )
        stateful = [config for config in configs if leaves_state(config)]
        if stateful and not machine.shares_cache:
            raise ConfigError(
                f"{name} does not share the cache folder of this machine, but with "
                f"rule = {stateful[0].aggregation.rule!r}, "
                f"control-variates = {stateful[0].aggregation.control_variates}, "
                f"optimizer-state = {stateful[0].training.optimizer_state!r} and "
                f"uplink-dtype = {stateful[0].federation.uplink_dtype!r} clients keep state there that their next "
                "round needs on any machine: set COPRA_FL_CACHE to a folder that all machines share"
            )
    if cluster.free_cpus < cluster.cpus or cluster.free_gpus < cluster.gpus:
        raise ConfigError(
            f"the Ray cluster at {cluster.address} is in use: {cluster.free_cpus:g} of {cluster.cpus:g} cores and "
            f"{cluster.free_gpus:g} of {cluster.gpus:g} GPUs are free; a simulation needs the whole cluster"
        )


def version_notes(cluster: Cluster) -> list[str]:
    """Return a note for each machine that has packages in other versions than this machine."""
    versions = provenance.versions()
    notes = []
    for machine in cluster.machines:
        different = [f"{name} {version}" for name, version in machine.versions.items() if version != versions[name]]
        if different:
            notes.append(
                f"machine {machine.address} has {', '.join(different)}, unlike this machine: results depend on which "
                "machine trains which client"
            )
    return notes


def divide(cluster: Cluster, number: int | None, num_clients: int, gpus: float | None) -> Workers:
    """Return workers of the largest equal size with which `number` of them fit into the cluster.

    `gpus` is the size in GPUs; None for the largest. Without a `number` there are up to 4 workers per machine, only on
    machines with a GPU if there are any. There are never more workers than clients. Raises ConfigError if they do not
    fit.
    """
    given = None if gpus is None else round_gpu_share(gpus)
    hosts = cluster.machines if given == 0 else [m for m in cluster.machines if m.gpus] or cluster.machines
    number = number or sum(min(MAX_DEFAULT_WORKERS, machine.capacity(1, given or 0.0)) for machine in hosts)
    number = max(1, min(number, num_clients))
    most_gpus = int(max(machine.gpus for machine in cluster.machines))
    if given is not None or not most_gpus:
        gpu_shares = [given or 0.0]
    else:
        whole_gpus = [float(n) for n in range(most_gpus, 0, -1)]
        gpu_shares = whole_gpus + [part_of_gpu(n) for n in range(2, number + 1)]
    most_cpus = int(max(machine.cpus for machine in cluster.machines))
    for gpu_share in gpu_shares:
        for cpus in range(most_cpus, 0, -1):
            if cluster.capacity(cpus, gpu_share) >= number:
                return Workers(number, cpus, gpu_share, nodes=number, starts_ray=False)
    raise ConfigError(
        f"the Ray cluster at {cluster.address} has room for {cluster.capacity(1, gpu_shares[-1])} workers, not "
        f"{number}: each needs a core and {gpu_shares[-1]:g} GPUs, and the cluster has {cluster.cpus:g} cores and "
        f"{cluster.gpus:g} GPUs; lower --workers or --gpus-per-worker"
    )
