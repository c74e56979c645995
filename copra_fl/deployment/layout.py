"""The folder of a deployment: where each file lies, and who may read it.

    deployment.toml             options of `copra-fl deploy init`
    .env                        values of the variables in the compose files
    docker-compose.yml          the SuperLink and all clients, for one machine
    docker-compose.gpu.yml      overlay of it: one GPU per client
    ca.key                      signs server certificates; mounted into no container
    server/tls/                 ca.crt, server.crt, server.key
    server/nodes/client-0.pub   public keys of the nodes that may connect
    server/peers/client-0.pub   public keys with which nodes sign for each other in secure aggregation
    server/data/                the server's data files, mounted read-only
    server/state/               Flower's database, the `flwr` connection to the SuperLink, the cache
    assets/                     models and data sets that the containers read, fetched by `copra-fl deploy run`
    tracking/                   files of trackers (`copra-fl deploy run --track`), one folder per run
    runs/                       one folder per run, and the audit log of the server app
    audit.jsonl                 the submitted runs
    clients/client-0/           everything that this client's machine needs:
        docker-compose.yml .env   this client alone, for a machine of its own
        tls/                      ca.crt, node.key, peer.key
        peers/                    copy of server/peers, mounted read-only
        data/                     its data files, mounted read-only
        policy/policy.toml        its policy, mounted read-only
        state/                    its cache, the state that it keeps from round to round, and its audit log

Private keys have mode 0600, folders 0700. The user who makes the folder owns it, and the containers run as that user.
If root makes it, what is mounted belongs to the image's own user instead, so that no container runs as root.

Containers write below state/ and runs/ only, and can put links there that lead anywhere on the host. Therefore nothing
here writes, or changes owner or mode, below these folders (container_files.py reads them).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from copra_fl.config import ConfigError
from copra_fl.files import atomic_write

#: name of an audit log
AUDIT = "audit.jsonl"
#: the first content of a policy
POLICY = """\
# The policy of this site: docs/how-to/site-policy.md of copra-fl. Without a setting every run is allowed.
# The node reads this file again for each message; without the file it rejects every run.
#
# models = "minilm"             # names, or the SHA-256 of the weights
# tasks = "text-classification"
# protection = "private"        # dp-clip above 0
# max-epsilon = 8.0
# min-examples = 100
# max-rounds = 500              # of all runs together
# max-mb-per-round = 50.0
"""
#: the user of the image (Dockerfile)
IMAGE_USER = 10001


@dataclass(frozen=True)
class ClientLayout:
    """The folder of one client's machine."""

    root: Path

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def policy(self) -> Path:
        return self.root / "policy" / "policy.toml"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def peers(self) -> Path:
        return self.root / "peers"

    @property
    def audit(self) -> Path:
        return self.state / "audit"

    @property
    def key(self) -> Path:
        return self.tls / "node.key"

    @property
    def peer_key(self) -> Path:
        """The key with which the node signs for its peers in secure aggregation; code of a run can read it."""
        return self.tls / "peer.key"


@dataclass(frozen=True)
class DeploymentLayout:
    """The folder of a deployment; `root` is absolute."""

    root: Path

    @classmethod
    def open(cls, directory: Path) -> DeploymentLayout:
        """Return the layout of the deployment in `directory`. Raises ConfigError if it holds no deployment."""
        layout = cls(directory.absolute())
        if not layout.exists:
            raise ConfigError(f"{directory} holds no deployment; create one with: copra-fl deploy init {directory}")
        return layout

    @property
    def exists(self) -> bool:
        """True if a deployment has been made here."""
        return (self.root / "docker-compose.yml").exists() and self.nodes.is_dir()

    @property
    def options(self) -> Path:
        return self.root / "deployment.toml"

    @property
    def assets(self) -> Path:
        return self.root / "assets"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking"

    @property
    def ca_key(self) -> Path:
        return self.root / "ca.key"

    @property
    def tls(self) -> Path:
        return self.root / "server" / "tls"

    @property
    def nodes(self) -> Path:
        return self.root / "server" / "nodes"

    @property
    def peers(self) -> Path:
        """Public keys of the clients' peer keys."""
        return self.root / "server" / "peers"

    @property
    def data(self) -> Path:
        return self.root / "server" / "data"

    @property
    def state(self) -> Path:
        return self.root / "server" / "state"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of the SuperLink: the `flwr` connection to it, and the registered nodes."""
        return self.state / "flower"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def public_key(self, number: int) -> Path:
        """The public key of client `number`: its node may connect while the file exists."""
        return self.nodes / f"{client_name(number)}.pub"

    def peer_public_key(self, number: int) -> Path:
        """The key by which nodes know client `number` in secure aggregation."""
        return self.peers / f"{client_name(number)}.pub"

    @property
    def audit_logs(self) -> tuple[Path, Path]:
        """The audit logs: of the submitted runs, which no container can reach, and of the server app."""
        return self.root / AUDIT, self.runs / AUDIT

    def client(self, number: int) -> ClientLayout:
        return ClientLayout(self.root / "clients" / client_name(number))

    def make_folders(self, num_clients: int) -> None:
        """Create the folders that are missing, accessible to their owner only; those that exist stay as they are."""
        clients = [self.client(number) for number in range(num_clients)]
        for path in (self.root, self.root / "server", self.root / "clients", *(client.root for client in clients)):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mounted = (self.tls, self.nodes, self.peers, self.data, self.state, self.assets, self.runs)
        for path in (
            *mounted,
            *(path for client in clients for path in (client.tls, client.peers, client.data, client.state)),
        ):
            _make_mounted(path)
        for client in clients:
            # A policy that was removed from its folder later stays away: without it the node rejects every run.
            if _make_mounted(client.policy.parent):
                write_mounted(client.policy, POLICY.encode())

    @property
    def container_user(self) -> str:
        """UID:GID that the containers run as."""
        return f"{os.getuid()}:{os.getgid()}" if os.getuid() != 0 else f"{IMAGE_USER}:{IMAGE_USER}"


def client_name(number: int) -> str:
    return f"client-{number}"


def write_mounted(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that containers read. One of mode 0600 is readable by others at no time."""
    atomic_write(path, content, mode)
    give_to_containers(path)


def _make_mounted(path: Path) -> bool:
    """Make a folder that is mounted into a container, unless it exists; return True if it was made."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    give_to_containers(path)
    return True


def give_to_containers(path: Path) -> None:
    """Give a file or folder that was just made to the image's user, if root made it; a link is not followed."""
    if os.getuid() == 0:
        os.chown(path, IMAGE_USER, IMAGE_USER, follow_symlinks=False)
