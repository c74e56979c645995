"""The compose files of a deployment, made from copra-fl's own: docker-compose.yml, and docker-compose.gpu.yml over it.

copra-fl's files have two clients. Here client-0 is copied for any number of clients, written alone for a machine of
its own, or stripped of TLS and keys for an insecure deployment.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from copra_fl.deployment.layout import DeploymentLayout, client_name
from copra_fl.deployment.options import DeploymentOptions

Document = dict[str, Any]

NAME, GPU_NAME = "docker-compose.yml", "docker-compose.gpu.yml"
#: port of the metrics in the SuperLink's container
METRICS_PORT = 9464
#: options that `--insecure` removes from the commands
SECURITY_OPTIONS = (
    "--ssl-", "--enable-supernode-auth", "--nodes=", "--root-certificates=", "--auth-supernode-private-key=",
    "--hide-keys",
)  # fmt: skip
#: node configuration of secure aggregation, which `--insecure` removes too
KEYS_OF_PEERS = ' node-key="/tls/peer.key" peers="/peers"'
#: prefix of the paths that containers mount
DEPLOYMENT_FOLDER = "${COPRA_FL_DEPLOYMENT:-./deployment}"


def write(layout: DeploymentLayout, originals: Path, options: DeploymentOptions) -> None:
    """Write all compose files of a deployment, and the values of their variables (.env).

    `originals` is the folder with copra-fl's own compose files.
    """
    base, gpu = (yaml.safe_load((originals / name).read_text(encoding="utf-8")) for name in (NAME, GPU_NAME))
    if options.insecure:
        base = without_security(base)
    if options.metrics_port:
        base = with_metrics(base, options.metrics_port)
    settings = {
        "COPRA_FL_SOURCE": str(originals),
        "COPRA_FL_DEPLOYMENT": str(layout.root),
        "COPRA_FL_CLIENTS": str(options.clients),
        "COPRA_FL_USER": layout.container_user,
        "COPRA_FL_LISTEN": f"{'0.0.0.0' if options.hosts else '127.0.0.1'}:{options.port}",
    }
    clients = range(options.clients)
    _write(layout.root, with_clients(base, clients), with_clients(gpu, clients), settings, limits())
    if options.server is None:
        return
    for number in clients:
        # A machine of its own numbers its GPUs from 0.
        gpu_alone = {"services": {client_name(number): without_build(gpu["services"][client_name(0)])}}
        alone = client_alone(base, number, options.server)
        _write(layout.client(number).root, alone, gpu_alone, {"COPRA_FL_CLIENTS": str(options.clients)}, {})


def limits() -> dict[str, str]:
    """Return limits of each container on this machine: 3/4 of its memory, and all of its cores but one."""
    megabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4 // 2**20
    cores = max(1, (os.cpu_count() or 1) - 1)
    return {f"COPRA_FL_{kind}_{limit}": value for kind in ("SERVER", "CLIENT")
            for limit, value in (("MEMORY", f"{megabytes}m"), ("CPUS", str(cores)))}  # fmt: skip


def num_clients(layout: DeploymentLayout) -> int:
    """Return the number of clients in the deployment's compose file."""
    services = yaml.safe_load((layout.root / NAME).read_text(encoding="utf-8"))["services"]
    return sum(name.startswith("client-") for name in services)


def with_clients(document: Document, numbers: Iterable[int]) -> Document:
    """Return `document` with the clients `numbers`, all copies of client-0, in place of its own clients."""
    others = {name: service for name, service in document["services"].items() if not name.startswith("client-")}
    template = document["services"][client_name(0)]
    return document | {"services": others | {client_name(number): _client(template, number) for number in numbers}}


def client_alone(document: Document, number: int, server: str) -> Document:
    """Return client `number` alone: it connects to `server` (HOST:PORT), and its folders lie beside the file.

    It is in the network of its machine, and fetches packaged models and data sets itself.
    """
    service = without_build(_client(document["services"][client_name(0)], number))
    del service["networks"]
    assets = f"{DEPLOYMENT_FOLDER}/assets:"
    service["volumes"] = [volume for volume in service["volumes"] if not volume.startswith(assets)]
    _replace(service["command"], "--superlink=superlink:8000", f"--superlink={server}")
    _replace(service["volumes"], f"{DEPLOYMENT_FOLDER}/clients/{client_name(number)}/", "./")
    return {"services": {client_name(number): service}}


def without_build(service: Document) -> Document:
    """Return `service` without its build section: the machine has the image already, and may lack the sources."""
    return {key: value for key, value in service.items() if key != "build"}


def without_security(document: Document) -> Document:
    """Return `document` without TLS and keys."""
    document = copy.deepcopy(document)
    for service in document["services"].values():
        command = [option for option in service["command"] if not option.startswith(SECURITY_OPTIONS)]
        service["command"] = [*command, "--insecure"]
        _replace(service["command"], KEYS_OF_PEERS, "")
        _replace(service["healthcheck"]["test"], "https://", "http://")
    return document


def with_metrics(document: Document, port: int) -> Document:
    """Return `document` with the SuperLink's metrics on `port` of the machine's loopback."""
    document = copy.deepcopy(document)
    superlink = document["services"]["superlink"]
    superlink["command"].append(f"--metrics-port={METRICS_PORT}")
    superlink["ports"].append(f"127.0.0.1:{port}:{METRICS_PORT}")
    return document


def _client(template: Document, number: int) -> Document:
    """Return the service of client `number`: a copy of client-0's with its node config, folders and GPU."""
    service = copy.deepcopy(template)
    command, volumes = service.get("command", []), service.get("volumes", [])
    _replace(command, "partition-id=0", f"partition-id={number}")
    _replace(command, "COPRA_FL_CLIENT_0", f"COPRA_FL_CLIENT_{number}")
    _replace(volumes, f"/clients/{client_name(0)}/", f"/clients/{client_name(number)}/")
    if "deploy" in service:
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        device["device_ids"] = [str(number)]
    return service


def _replace(texts: list[str], old: str, new: str) -> None:
    """Replace `old` by `new` in all `texts`, in place."""
    texts[:] = [text.replace(old, new) for text in texts]


def _write(directory: Path, base: Document, gpu: Document, settings: dict[str, str], defaults: dict[str, str]) -> None:
    """Write the compose files and .env of one folder; lines that users have added to .env or changed stay."""
    for name, document in ((NAME, base), (GPU_NAME, gpu)):
        document = {key: value for key, value in document.items() if not key.startswith("x-")}
        text = "# Written by `copra-fl deploy init`; the next `copra-fl deploy init` overwrites it.\n"
        text += yaml.safe_dump(document, sort_keys=False, width=1000)
        (directory / name).write_text(text, encoding="utf-8")
    path = directory / ".env"
    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in earlier if line.partition("=")[0] not in settings]
    names = {line.partition("=")[0] for line in kept}
    settings = settings | {name: value for name, value in defaults.items() if name not in names}
    path.write_text("\n".join([*(f"{key}={value}" for key, value in settings.items()), *kept, ""]), encoding="utf-8")
