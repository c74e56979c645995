"""`copra-fl deploy init | up | logs | down`: a deployment's folder and its containers (`run` and `status`: deploy_run).

Everything is in one folder (copra_fl/deployment/folder.py), and plain compose commands work in it too.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copra_fl.config import ConfigError
from copra_fl.deployment import compose, compose_command, nodes
from copra_fl.deployment.layout import Folder, client_name
from copra_fl.simulation.superlink import RunFailed, app_directory

app = typer.Typer(help="Run a federation on real nodes: containers, TLS, keys.", no_args_is_help=True)
console = Console(stderr=True)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment.")]


@app.command()
def init(
    directory: Directory,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Number of clients.")] = 2,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Name or address of the server for clients on other machines.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the server.")] = 8000,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", min=1, max=65535, help="Port of this machine's loopback for Prometheus."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys: whoever connects is a node.")] = False,
) -> None:
    """Make keys, certificates and compose files in DIR. Repeated, it keeps the CA, the keys and the data."""
    from copra_fl.deployment import certificates

    folder, hosts = Folder(directory.absolute()), host or []
    if folder.root.exists() and any(folder.root.iterdir()) and not folder.exists:
        raise ConfigError(f"{directory} is not empty and holds no deployment; name a new folder")
    folder.make(clients)
    if not insecure:
        certificates.make_ca(folder)
        certificates.make_server_certificate(folder, hosts)
        certificates.make_node_keys(folder, clients)
    nodes.write_connection(folder, insecure)
    settings = {
        "COPRA_FL_SOURCE": str(app_directory()),
        "COPRA_FL_DEPLOYMENT": str(folder.root),
        "COPRA_FL_CLIENTS": str(clients),
        "COPRA_FL_USER": folder.user,
        "COPRA_FL_LISTEN": f"{'0.0.0.0' if hosts else '127.0.0.1'}:{port}",
    }
    server = f"{hosts[0]}:{port}" if hosts else None
    compose.write(folder, app_directory(), clients, server, insecure, metrics_port, settings)
    folder.hand_over()
    if insecure:
        console.print("[bold red]insecure[/]: nothing is encrypted, and whoever reaches the port is a client")
    console.print(f"{folder.root}: {clients} clients; next: copra-fl deploy up {directory}", soft_wrap=True)


@app.command()
def up(
    directory: Directory,
    gpu: Annotated[bool, typer.Option("--gpu", help="A GPU for each client (docker-compose.gpu.yml).")] = False,
    build: Annotated[
        bool, typer.Option("--build/--no-build", help="Build the image, or take the one there is.")
    ] = True,
    wait: Annotated[int, typer.Option("--wait", min=1, help="Seconds for the clients to connect.")] = 180,
    server_only: Annotated[
        bool, typer.Option("--server-only", help="The SuperLink alone: the clients are on machines of their own.")
    ] = False,
) -> None:
    """Build the image, start the SuperLink and the clients, and wait until all are connected."""
    folder = Folder.open(directory)
    containers = compose_command.find(folder)
    if build and not (app_directory() / "Dockerfile").exists():
        raise ConfigError(
            "there is no Dockerfile beside an installed copra-fl: build the image from a checkout, then up --no-build"
        )
    if build:
        for service in ["superlink", *([client_name(0)] if gpu else [])]:
            containers.run("build", service, gpu=gpu)
    containers.run("up", "-d", *(["superlink"] if server_only else []), gpu=gpu)
    wanted = 0 if server_only else compose.num_clients(folder)
    deadline = time.monotonic() + wait
    while (found := nodes.find(containers)) is None or sum(node.status == "online" for node in found) < wanted:
        if time.monotonic() > deadline:
            what = (
                "the SuperLink does not answer" if found is None else f"connected is too little: {nodes.words(found)}"
            )
            raise RunFailed(f"after {wait} s {what}; why: copra-fl deploy logs {directory}")
        time.sleep(1)
    console.print(f"{nodes.words(found)}; next: copra-fl deploy run smoke {directory}", soft_wrap=True)


@app.command()
def logs(
    directory: Directory,
    service: Annotated[str | None, typer.Argument(metavar="[SERVICE]", help="superlink, client-0, ...")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
) -> None:
    """What the containers have printed."""
    compose_command.find(Folder.open(directory)).run("logs", *(["-f"] if follow else []), *filter(None, [service]))


@app.command()
def down(directory: Directory) -> None:
    """Stop the containers. Keys, state and runs stay in DIR; `up` goes on with them."""
    compose_command.find(Folder.open(directory)).run("down")
