"""The compose files of a deployment, made of those that come with copra-fl: docker-compose.yml, and .gpu.yml over it.

They have two clients; here a client is repeated as often as wanted, set alone for a machine of its own, or stripped
of TLS and keys where that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from copra_fl.deployment.layout import Folder, client_name

Document = dict[str, Any]

NAME, GPU_NAME = "docker-compose.yml", "docker-compose.gpu.yml"
#: where in its container the SuperLink serves metrics
METRICS_PORT = 9464
#: what `--insecure` leaves out of the commands
SECURE = ("--ssl-", "--enable-supernode-auth", "--nodes=", "--root-certificates=", "--auth-supernode-private-key=")


def write(
    folder: Folder,
    originals: Path,
    num_clients: int,
    server: str | None,
    insecure: bool,
    metrics_port: int | None,
    settings: dict[str, str],
) -> None:
    """All compose files of a deployment and the settings (.env) that they are filled in with.

    `originals` is the folder with copra-fl's own. `server` is the HOST:PORT that clients on other machines connect to;
    None: all are on this one. `metrics_port`: where on this machine's loopback Prometheus finds metrics; None: nowhere.
    """
    base, gpu = (yaml.safe_load((originals / name).read_text(encoding="utf-8")) for name in (NAME, GPU_NAME))
    if insecure:
        base = without_security(base)
    if metrics_port:
        base = with_metrics(base, metrics_port)
    _write(folder.root, with_clients(base, range(num_clients)), with_clients(gpu, range(num_clients)), settings)
    if server is None:
        return
    for number in range(num_clients):
        # A machine of its own numbers its GPUs from 0.
        gpu_alone = {"services": {client_name(number): without_build(gpu["services"][client_name(0)])}}
        alone = client_alone(base, number, server)
        _write(folder.client(number).root, alone, gpu_alone, {"COPRA_FL_CLIENTS": str(num_clients)})


def num_clients(folder: Folder) -> int:
    """How many clients the deployment's compose file has."""
    services = yaml.safe_load((folder.root / NAME).read_text(encoding="utf-8"))["services"]
    return sum(name.startswith("client-") for name in services)


def with_clients(document: Document, numbers: Iterable[int]) -> Document:
    """`document` with the clients `numbers`, each a copy of client-0."""
    others = {name: service for name, service in document["services"].items() if not name.startswith("client-")}
    first = json.dumps(document["services"][client_name(0)])
    clients = {client_name(number): json.loads(_renumbered(first, number)) for number in numbers}
    return {"services": others | clients}


def client_alone(document: Document, number: int, server: str) -> Document:
    """Client `number` alone, which connects to `server` (HOST:PORT); what it mounts lies beside the file."""
    name = client_name(number)
    service = json.dumps(with_clients(document, [number])["services"][name])
    service = service.replace("--superlink=superlink:8000", f"--superlink={server}")
    service = service.replace(f"${{COPRA_FL_DEPLOYMENT:-./deployment}}/clients/{name}", ".")
    return {"services": {name: without_build(json.loads(service))}}


def without_build(service: Document) -> Document:
    """A service whose image is there already: no sources are taken for granted beside the file."""
    return {key: value for key, value in service.items() if key != "build"}


def without_security(document: Document) -> Document:
    """`document` with neither TLS nor keys."""
    document = json.loads(json.dumps(document).replace("https://", "http://"))
    for service in document["services"].values():
        service["command"] = [word for word in service["command"] if not word.startswith(SECURE)] + ["--insecure"]
    return document


def with_metrics(document: Document, port: int) -> Document:
    """`document` with the SuperLink's metrics on `port` of the machine's loopback."""
    superlink = document["services"]["superlink"]
    command = [*superlink["command"], f"--metrics-port={METRICS_PORT}"]
    ports = [*superlink["ports"], f"127.0.0.1:{port}:{METRICS_PORT}"]
    return {"services": document["services"] | {"superlink": superlink | {"command": command, "ports": ports}}}


def _renumbered(service: str, number: int) -> str:
    for old, new in (
        (client_name(0), client_name(number)),
        ("partition-id=0", f"partition-id={number}"),
        ("COPRA_FL_CLIENT_0", f"COPRA_FL_CLIENT_{number}"),
        ('"device_ids": ["0"]', f'"device_ids": ["{number}"]'),
    ):
        service = service.replace(old, new)
    return service


def _write(directory: Path, base: Document, gpu: Document, settings: dict[str, str]) -> None:
    """The compose files and .env of one folder; lines that people have added to .env stay."""
    for name, document in ((NAME, base), (GPU_NAME, gpu)):
        text = "# Written by `copra-fl deploy init`, which writes it again when it is repeated.\n"
        text += yaml.safe_dump(document, sort_keys=False, width=1000)
        (directory / name).write_text(text, encoding="utf-8")
    path = directory / ".env"
    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    added = [line for line in earlier if line.partition("=")[0] not in settings]
    path.write_text("\n".join([*(f"{key}={value}" for key, value in settings.items()), *added, ""]), encoding="utf-8")
