"""The folder of a deployment: where each file lies, and who may read it.

    .env                        values of the variables in the compose files
    docker-compose.yml          the SuperLink and all clients, for one machine
    docker-compose.gpu.yml      overlay of it: one GPU per client
    ca.key                      signs server certificates; mounted into no container
    server/tls/                 ca.crt, server.crt, server.key
    server/nodes/client-0.pub   public keys of the nodes that may connect
    server/data/                the server's data files, mounted read-only
    server/state/               Flower's database, the `flwr` connection to the SuperLink, the cache
    runs/                       one folder per run, and the audit log of the server app
    audit.jsonl                 the submitted runs
    clients/client-0/           everything that this client's machine needs:
        docker-compose.yml .env   this client alone, for a machine of its own
        tls/                      ca.crt, node.key
        peers/                    public keys of all nodes, for secure aggregation; mounted read-only
        data/                     its data files, mounted read-only
        policy/policy.toml        its policy, mounted read-only
        state/                    its cache, the state that it keeps from round to round, and its audit log

Private keys have mode 0600, folders 0700. The user who makes the folder owns it, and the containers run as that user.
If root makes it, the files belong to the image's own user instead, so that no container runs as root.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from copra_fl.config import ConfigError

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
        return (self.root / "docker-compose.yml").exists() and self.flower_home.is_dir()

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

    @property
    def audit_logs(self) -> tuple[Path, Path]:
        """The audit logs: of the submitted runs, which no container can reach, and of the server app."""
        return self.root / AUDIT, self.runs / AUDIT

    def client(self, number: int) -> ClientLayout:
        return ClientLayout(self.root / "clients" / client_name(number))

    def make_folders(self, num_clients: int) -> None:
        """Create the folders that are missing, accessible to their owner only."""
        server = (self.tls.parent, self.tls, self.nodes, self.data, self.state, self.flower_home)
        clients = [
            path
            for client in map(self.client, range(num_clients))
            for path in (client.root, client.tls, client.peers, client.data, client.policy.parent, client.state)
        ]
        for path in (self.root, self.runs, *server, self.root / "clients", *clients):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)

    def make_policies(self, num_clients: int) -> None:
        """Write a policy that allows every run for each client without a policy."""
        for client in map(self.client, range(num_clients)):
            if not client.policy.exists():
                client.policy.write_text(POLICY, encoding="utf-8")

    def give_to_image_user(self) -> None:
        """If root made the folder, give to the image's user the files that containers need.

        Files in the data folders keep their owner: users put them there.
        """
        if os.getuid() != 0:
            return
        for top in (self.root / "server", self.runs, self.root / "clients"):
            for folder, subfolders, files in os.walk(top):
                os.chown(folder, IMAGE_USER, IMAGE_USER)
                if Path(folder).name == "data":
                    subfolders.clear()
                    continue
                for file in files:
                    os.chown(os.path.join(folder, file), IMAGE_USER, IMAGE_USER)

    @property
    def container_user(self) -> str:
        """UID:GID that the containers run as."""
        return f"{os.getuid()}:{os.getgid()}" if os.getuid() != 0 else f"{IMAGE_USER}:{IMAGE_USER}"


def client_name(number: int) -> str:
    return f"client-{number}"


def write_private(path: Path, content: bytes) -> None:
    """Write a file with mode 0600; others cannot read it at any time, not even before its mode is set."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(content)
