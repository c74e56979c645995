"""Where a simulation runs: on this machine, or on those of a Ray cluster that is there already (`--ray-address`).

Flower fills a whole cluster with workers of equal shares, and looks for no reason why one of them could not work. So
each machine is looked at (`ray_look.py`) before a run is submitted: sources and versions, paths, cache, what is free.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor, inf
from pathlib import Path
from typing import Any

from rich.console import Console

import copra_fl
from copra_fl import provenance
from copra_fl.config import Config, ConfigError
from copra_fl.files import cache_dir
from copra_fl.simulation.preflight import local_paths
from copra_fl.simulation.superlink import MAX_DEFAULT_WORKERS, Workers, worker_variables

CONNECT_SECONDS = 5
#: for a look at all machines; Ray itself goes on trying for nearly two minutes
LOOK_SECONDS = 90
#: Ray counts shares of a GPU in this
SMALLEST_SHARE = 1e-4


def reachable(address: str | None) -> str | None:
    """`address` as it is. Raises ConfigError unless it is HOST:PORT and something listens there."""
    if address is None:
        return None
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit()) or "/" in host:
        raise ConfigError(f"--ray-address {address!r} is not HOST:PORT, like 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster answers there ({error}); `ray start --head` starts one and says "
            "where it is"
        ) from None
    return address


@dataclass(frozen=True)
class Demand:
    """How a simulation is to be spread, as its user says; what is None is chosen.

    Attributes:
        workers: how many.
        gpus_per_worker: the share of a GPU for each.
        ray_address: of a cluster; without it Ray starts on this machine.
    """

    workers: int | None
    gpus_per_worker: float | None
    ray_address: str | None

    def meet(self, configs: Sequence[Config], console: Console) -> Workers:
        """The workers for runs of `configs`. Raises ConfigError where the cluster cannot train them."""
        num_clients = max(config.data.num_clients for config in configs)
        if self.ray_address is None:
            return Workers.share(self.workers, num_clients, self.gpus_per_worker)
        with console.status("looking at the Ray cluster"):
            cluster = look(self.ray_address, sorted({path for config in configs for path in local_paths(config)}))
        check(cluster, configs)
        for note in differences(cluster):
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        workers = share(cluster, self.workers, num_clients, self.gpus_per_worker)
        console.print(
            f"{workers.number} workers on a Ray cluster of {len(cluster.machines)} machines, {workers.cpus} cores and "
            f"{workers.gpus:g} GPUs each",
            highlight=False,
        )
        return workers


@dataclass(frozen=True)
class Machine:
    """One that can train, as `ray_look.py` sees it from there.

    Attributes:
        digest: `provenance.source_digest` of its copra_fl.
        versions: `provenance.versions`.
        missing: paths that are wanted and not there.
        shares_cache: whether its cache is the asker's.
        error: why it has no copra_fl.
    """

    address: str
    cpus: float
    gpus: float
    digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()
    shares_cache: bool = False
    error: str = ""

    def room(self, cpus: int, gpus: float) -> int:
        """How many workers with these shares Flower starts here."""
        return int(min(self.cpus / cpus, self.gpus / gpus if gpus else inf))


@dataclass(frozen=True)
class Cluster:
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

    def room(self, cpus: int, gpus: float) -> int:
        return sum(machine.room(cpus, gpus) for machine in self.machines)


def look(address: str, paths: Sequence[str]) -> Cluster:
    """The cluster at `address`, each machine asked for `paths`. Raises ConfigError where it cannot be joined."""
    with tempfile.NamedTemporaryFile(dir=cache_dir(), prefix=".cluster-") as mark:
        question = {"address": address, "variables": worker_variables(), "paths": paths, "mark": Path(mark.name).name}
        try:
            found = _ask(question)
        except subprocess.TimeoutExpired:
            found = {"error": f"no answer within {LOOK_SECONDS} s"}
    if "error" in found:
        raise ConfigError(f"--ray-address {address}: this machine cannot join a Ray cluster there: {found['error']}")
    machines = tuple(Machine(**seen) for seen in found["machines"])
    return Cluster(address, machines, found["free_cpus"], found["free_gpus"])


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("inspect_ray.py"))]
    ran = subprocess.run(
        command, input=json.dumps(question), capture_output=True, text=True, timeout=LOOK_SECONDS, check=False
    )
    try:
        return json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": ran.stderr.strip() or f"exit code {ran.returncode}"}


def check(cluster: Cluster, configs: Sequence[Config]) -> None:
    """Raise ConfigError unless the cluster is free and each of its machines can train any client of `configs`."""
    from copra_fl.training.plan import leaves_state

    digest, version = provenance.source_digest(Path(copra_fl.__file__).parent), provenance.versions()["flwr"]
    for machine in cluster.machines:
        who = f"machine {machine.address} of the Ray cluster"
        if machine.error:
            raise ConfigError(f"{who} has no copra-fl that its Python finds ({machine.error}); install it there")
        if machine.digest != digest:
            raise ConfigError(
                f"{who} has other sources of copra_fl (digest {machine.digest[:12]}) than this one ({digest[:12]}); "
                "install the same version on all"
            )
        if machine.versions["flwr"] != version:
            raise ConfigError(f"{who} has flwr {machine.versions['flwr']}, this one {version}; install the same on all")
        if machine.missing:
            raise ConfigError(
                f"{who} has no {', '.join(machine.missing)}; what dataset, test-file and model name by path must lie "
                "at the same place on all machines"
            )
        stateful = [config for config in configs if leaves_state(config)]
        if stateful and not machine.shares_cache:
            raise ConfigError(
                f"{who} has a cache of its own, but with rule = {stateful[0].aggregation.rule!r}, control-variates = "
                f"{stateful[0].aggregation.control_variates} and uplink-dtype = "
                f"{stateful[0].federation.uplink_dtype!r} clients leave state there for their next round, "
                "which any machine may train: set COPRA_FL_CACHE to a folder that all machines share"
            )
    if cluster.free_cpus < cluster.cpus or cluster.free_gpus < cluster.gpus:
        raise ConfigError(
            f"the Ray cluster at {cluster.address} is in use: {cluster.free_cpus:g} of {cluster.cpus:g} cores and "
            f"{cluster.free_gpus:g} of {cluster.gpus:g} GPUs are free; a simulation takes all of a cluster"
        )


def differences(cluster: Cluster) -> list[str]:
    """In words, which machines have packages in other versions than this one."""
    here = provenance.versions()
    notes = []
    for machine in cluster.machines:
        other = [f"{name} {version}" for name, version in machine.versions.items() if version != here[name]]
        if other:
            notes.append(f"machine {machine.address} has {', '.join(other)}: results depend on who trains which client")
    return notes


def share(cluster: Cluster, number: int | None, num_clients: int, gpus: float | None) -> Workers:
    """The largest equal shares with which as many workers as are wanted have room.

    Without a `number` there are up to 4 on each machine, on those with a GPU where there is one; never more than
    clients. Raises ConfigError where there is no room.
    """
    asked = None if gpus is None else whole_share(gpus)
    hosts = cluster.machines if asked == 0 else [m for m in cluster.machines if m.gpus] or cluster.machines
    wanted = number or sum(min(MAX_DEFAULT_WORKERS, machine.room(1, asked or 0.0)) for machine in hosts)
    wanted = max(1, min(wanted, num_clients))
    most_gpus = int(max(machine.gpus for machine in cluster.machines))
    if asked is not None or not most_gpus:
        gpu_shares = [asked or 0.0]
    else:
        gpu_shares = [float(n) for n in range(most_gpus, 0, -1)] + [whole_share(1 / n) for n in range(2, wanted + 1)]
    most_cpus = int(max(machine.cpus for machine in cluster.machines))
    for gpu_share in gpu_shares:
        for cpus in range(most_cpus, 0, -1):
            if cluster.room(cpus, gpu_share) >= wanted:
                return Workers(wanted, cpus, gpu_share, nodes=wanted, starts_ray=False)
    raise ConfigError(
        f"the Ray cluster at {cluster.address} has room for {cluster.room(1, gpu_shares[-1])} workers, not {wanted}: "
        f"each takes a core and {gpu_shares[-1]:g} GPUs, and there are {cluster.cpus:g} cores and {cluster.gpus:g} GPUs"
    )


def whole_share(gpus: float) -> float:
    """The largest share of which as many fit on one GPU as of `gpus`: a worker cannot have parts of two.

    Flower does not know that, and would wait for ever for the third of three workers with 0.6 each on two GPUs.
    """
    return floor(1 / int(1 / gpus) / SMALLEST_SHARE) * SMALLEST_SHARE if 0 < gpus < 1 else float(ceil(gpus))
