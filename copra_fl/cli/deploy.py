"""`copra-fl deploy init | up | logs | down`: a deployment's folder and its containers (`run` and `status`: deploy_run).

Everything lies in one folder (copra_fl/deployment/layout.py); plain compose commands work in it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copra_fl.config import ConfigError
from copra_fl.deployment import compose, nodes
from copra_fl.deployment.compose_command import find_compose
from copra_fl.deployment.layout import DeploymentLayout, client_name
from copra_fl.simulation.superlink import app_directory

app = typer.Typer(help="Run a federation on real nodes: containers, TLS, node keys.", no_args_is_help=True)
console = Console(stderr=True)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment.", show_default=False)]


@app.command()
def init(
    directory: Directory,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Number of clients.")] = 2,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="Name or address of the server, for clients on other machines; opens the port to the network. "
            "May be repeated.",
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the server.")] = 8000,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", min=1, max=65535, help="Port for Prometheus metrics on localhost."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS and no keys: anyone can connect as a node.")
    ] = False,
) -> None:
    """Create keys, certificates and compose files in DIR. Repeating it keeps the CA, the keys and the data."""
    from copra_fl.deployment import certificates

    layout, hosts = DeploymentLayout(directory.absolute()), host or []
    if layout.root.exists() and any(layout.root.iterdir()) and not layout.exists:
        raise ConfigError(f"{directory} is not empty and holds no deployment; name a new folder")
    layout.make_folders(clients)
    layout.make_policies(clients)
    if not insecure:
        certificates.make_ca(layout)
        certificates.make_server_certificate(layout, hosts)
        certificates.make_node_keys(layout, clients)
    nodes.write_connection(layout, insecure)
    settings = {
        "COPRA_FL_SOURCE": str(app_directory()),
        "COPRA_FL_DEPLOYMENT": str(layout.root),
        "COPRA_FL_CLIENTS": str(clients),
        "COPRA_FL_USER": layout.container_user,
        "COPRA_FL_LISTEN": f"{'0.0.0.0' if hosts else '127.0.0.1'}:{port}",
    }
    server = f"{hosts[0]}:{port}" if hosts else None
    compose.write(layout, app_directory(), clients, server, insecure, metrics_port, settings)
    layout.give_to_image_user()
    if insecure:
        console.print("[bold red]insecure[/]: nothing is encrypted, and anyone who reaches the port can be a client")
    console.print(f"{layout.root}: {clients} clients; next: copra-fl deploy up {directory}", soft_wrap=True)


@app.command()
def up(
    directory: Directory,
    gpu: Annotated[bool, typer.Option("--gpu", help="Give each client a GPU (docker-compose.gpu.yml).")] = False,
    build: Annotated[bool, typer.Option("--build/--no-build", help="Build the image, or use the existing one.")] = True,
    wait: Annotated[
        int, typer.Option("--wait", min=1, help="Maximum number of seconds to wait for the clients to connect.")
    ] = 180,
    server_only: Annotated[
        bool, typer.Option("--server-only", help="Start only the SuperLink; the clients run on other machines.")
    ] = False,
) -> None:
    """Build the image, start the SuperLink and the clients, and wait until all clients are connected."""
    layout = DeploymentLayout.open(directory)
    compose_command = find_compose(layout)
    if build and not (app_directory() / "Dockerfile").exists():
        raise ConfigError(
            "an installed copra-fl has no Dockerfile: build the image in a checkout, then use `up --no-build`"
        )
    if build:
        for service in ["superlink", *([client_name(0)] if gpu else [])]:
            compose_command.run("build", service, gpu=gpu)
    compose_command.run("up", "-d", *(["superlink"] if server_only else []), gpu=gpu)
    num_clients = 0 if server_only else compose.num_clients(layout)
    online = nodes.wait_until_online(compose_command, num_clients, wait)
    console.print(f"{nodes.describe(online)}; next: copra-fl deploy run smoke {directory}", soft_wrap=True)


@app.command()
def logs(
    directory: Directory,
    service: Annotated[
        str | None, typer.Argument(metavar="[SERVICE]", help="superlink, client-0, ... Default: all services.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print new output until Ctrl-C.")] = False,
) -> None:
    """Print the logs of the containers."""
    compose_command = find_compose(DeploymentLayout.open(directory))
    compose_command.run("logs", *(["-f"] if follow else []), *filter(None, [service]))


@app.command()
def down(directory: Directory) -> None:
    """Stop the containers. Keys, state and runs stay in DIR; `up` starts them again."""
    find_compose(DeploymentLayout.open(directory)).run("down")
