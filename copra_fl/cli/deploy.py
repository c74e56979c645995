"""`copra-fl deploy init | rotate | up | logs | down`: a deployment's folder and its containers.

`run` and `status` are in deploy_run.py.

Everything lies in one folder (copra_fl/deployment/layout.py); plain compose commands work in it too.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from copra_fl.config import ConfigError
from copra_fl.console import plain_console
from copra_fl.deployment import compose, nodes
from copra_fl.deployment.compose_command import find_compose
from copra_fl.deployment.layout import DeploymentLayout, client_name
from copra_fl.deployment.options import DeploymentOptions, check_host, read_options
from copra_fl.simulation.superlink import app_directory
from copra_fl.wording import join_words, unknown_name

app = typer.Typer(help="Run a federation on real nodes: containers, TLS, node keys.", no_args_is_help=True)
console = plain_console(stderr=True)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment.", show_default=False)]


@app.command()
def init(
    directory: Directory,
    clients: Annotated[int | None, typer.Option("--clients", min=1, help="Number of clients. Default: 2.")] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            help="Name or address of the server, for clients on other machines; opens the port to the network. "
            'May be repeated. --host "" closes the port again.',
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Port of the server. Default: 8000.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", min=0, max=65535, help="Port for Prometheus metrics on localhost. Default: 0, no metrics."
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure/--secure", help="No TLS and no keys: anyone can connect as a node. Default: secure."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove keys of clients without asking.")] = False,
) -> None:
    """Create keys, certificates and compose files in DIR. Repeated, it changes what its options say, nothing else."""
    from copra_fl.deployment import certificates

    layout = DeploymentLayout(directory.absolute())
    if layout.root.exists() and any(layout.root.iterdir()) and not layout.exists:
        raise ConfigError(f"{directory} is not empty and holds no deployment; name a new folder")
    earlier = _earlier_options(layout, clients)
    hosts = None if host is None else tuple(map(check_host, filter(None, host)))
    given: dict[str, Any] = {
        "clients": clients, "hosts": hosts, "port": port, "metrics_port": metrics_port, "insecure": insecure
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    options = replace(earlier or DeploymentOptions(), **changes)
    surplus = [] if options.insecure else certificates.surplus_keys(layout, options.clients)
    if surplus and not yes:
        _confirm_removal([path.stem for path in surplus])
    layout.make_folders(options.clients)
    if not options.insecure:
        certificates.make_ca(layout)
        if not certificates.is_for(layout, options.hosts):
            certificates.make_server_certificate(layout, options.hosts)
            if earlier and not earlier.insecure:
                console.print(f"superlink: new certificate. {_restart(layout, 'superlink')}", soft_wrap=True)
        first_new = earlier.clients if earlier and not earlier.insecure else 0
        certificates.share_ca(layout, options.clients)
        certificates.make_node_keys(layout, range(first_new, options.clients))
        certificates.make_peer_keys(layout, options.clients)
        for path in surplus:
            path.unlink()
    compose.write(layout, app_directory(), options)
    options.write(layout.options)
    if options.insecure:
        warning = ": nothing is encrypted, and anyone who reaches the port can be a client"
        console.print(Text.assemble(("insecure", "bold red"), warning))
    console.print(f"{layout.root}: {options.clients} clients; next: copra-fl deploy up {directory}", soft_wrap=True)


def _earlier_options(layout: DeploymentLayout, clients: int | None) -> DeploymentOptions | None:
    """Return the options that the deployment was made with; None for a new one."""
    if layout.options.exists():
        return read_options(layout.options)
    if layout.exists and clients is None:
        raise ConfigError(
            f"{layout.root} was made by an earlier copra-fl, which did not keep the options of `init`: give all of "
            "them once more (--clients, --host, --port, --metrics-port, --insecure)"
        )
    return None


def _confirm_removal(names: list[str]) -> None:
    """Ask whether the keys of the clients `names` may be removed. Raises ConfigError if not, or without a terminal."""
    consequence = f"removes the keys of {join_words(names)}: the server rejects these nodes from then on"
    if not sys.stdin.isatty():
        raise ConfigError(f"this {consequence}. Repeat the command with --yes")
    if not typer.confirm(f"This {consequence}. Continue?", err=True):
        raise ConfigError("nothing was changed")


@app.command()
def rotate(
    directory: Directory,
    certificate: Annotated[
        bool, typer.Option("--certificate", help="A new certificate and key of the server.")
    ] = False,
    node: Annotated[
        list[str] | None,
        typer.Option("--node", metavar="CLIENT", help="New keys of client-0, client-1, ... May be repeated."),
    ] = None,
) -> None:
    """Replace the server's certificate or keys of nodes. The old ones of nodes are rejected within seconds."""
    from copra_fl.deployment import certificates

    layout = DeploymentLayout.open(directory)
    options = read_options(layout.options)
    numbers = {client_name(number): number for number in range(options.clients)}
    if unknown := [name for name in node or [] if name not in numbers]:
        raise ConfigError(unknown_name("node", unknown[0], numbers))
    if not certificate and not node:
        raise ConfigError("name what to replace: --certificate, or --node client-0")
    if options.insecure:
        raise ConfigError(f"{directory} has neither certificates nor keys: it was made with --insecure")
    if certificate:
        certificates.make_server_certificate(layout, options.hosts)
        days = certificates.days_left(layout.tls)["server"]
        console.print(f"superlink: new certificate for {days} days. {_restart(layout, 'superlink')}", soft_wrap=True)
    for name in node or []:
        certificates.replace_keys(layout, numbers[name], options.clients)
        client = layout.client(numbers[name])
        moved = f"If it runs on another machine, move {client.key} and {client.peer_key} there."
        console.print(f"{name}: new keys. {moved} {_restart(layout, name)}", soft_wrap=True)
    if node:
        console.print(
            "secure aggregation: copy the folder `peers` of each client that runs on another machine to it, or its "
            f"node does not accept the new signatures of {join_words(node)}",
            soft_wrap=True,
        )


def _restart(layout: DeploymentLayout, service: str) -> str:
    return f"Restart it: cd {layout.root} && docker compose restart {service}"


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
