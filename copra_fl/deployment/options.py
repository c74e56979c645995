"""The options of `copra-fl deploy init`, kept in deployment.toml: repeated, `init` changes those that it is given."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

from copra_fl.config import ConfigError, read_toml, toml_value
from copra_fl.files import atomic_write

HEADER = "# Options of `copra-fl deploy init`. Change them with it: it also writes the files that follow from them.\n"
#: a name of the DNS, of 253 characters at most; the last label is no number, else it would be a wrong IPv4 address
HOST_NAME = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*(?!\d+$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.I
)


@dataclass(frozen=True)
class DeploymentOptions:
    """The options that the files of a deployment are made from.

    Attributes:
        clients: number of clients.
        hosts: names and addresses of the server for other machines; empty: the port is open to this machine only.
        port: of the server.
        metrics_port: of Prometheus metrics on this machine's loopback; 0 for no metrics.
        insecure: without TLS and keys.
    """

    clients: int = 2
    hosts: tuple[str, ...] = ()
    port: int = 8000
    metrics_port: int = 0
    insecure: bool = False

    @property
    def server(self) -> str | None:
        """HOST:PORT of the server for clients on other machines; None if all clients are on this machine."""
        if not self.hosts:
            return None
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"{host}:{self.port}"

    def write(self, path: Path) -> None:
        lines = [f"clients = {self.clients}", f"hosts = {json.dumps(self.hosts)}", f"port = {self.port}"]
        lines += [f"metrics-port = {self.metrics_port}", f"insecure = {toml_value(self.insecure)}"]
        atomic_write(path, HEADER + "\n".join(lines) + "\n")


def read_options(path: Path) -> DeploymentOptions:
    """Return the options in the file `path`. Raises ConfigError if it was changed to what `init` does not write."""
    values = {name.replace("-", "_"): value for name, value in read_toml(path).items()}
    kinds = {field.name: type(getattr(DeploymentOptions(), field.name)) for field in fields(DeploymentOptions)}
    hosts = values.get("hosts")
    if isinstance(hosts, list) and all(isinstance(host, str) for host in hosts):
        values["hosts"] = tuple(map(check_host, hosts))
    if {name: type(value) for name, value in values.items()} != kinds:
        raise ConfigError(f"{path} is not as `copra-fl deploy init` wrote it; restore it from a backup")
    return DeploymentOptions(**values)


def check_host(host: str) -> str:
    """Return `host` if it is a host name or an IP address. Raises ConfigError."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if HOST_NAME.fullmatch(host):
            return host
    raise ConfigError(
        f"--host {host!r} is neither a host name like fl.example.org nor an IP address like 192.0.2.7 (the port has "
        "its own option, --port)"
    )
