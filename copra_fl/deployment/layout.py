"""The folder of a deployment: what lies where, and who may read it.

    .env                        what the compose files are filled in with
    docker-compose.yml          the SuperLink and all clients, for one machine
    docker-compose.gpu.yml      laid over it: a GPU a client
    ca.key                      signs server certificates; no container sees it
    server/tls/                 ca.crt, server.crt, server.key
    server/nodes/client-0.pub   the nodes that may connect: one public key each
    server/data/                the server's data files, mounted read-only
    server/state/               Flower's database, how `flwr` reaches the SuperLink, the cache
    runs/                       a folder a run
    clients/client-0/           all that this client's machine needs:
        docker-compose.yml .env   the client alone, on a machine of its own
        tls/                      ca.crt, node.key
        data/                     its data files, mounted read-only
        state/                    its cache, and what stays with it from round to round

Private keys have mode 0600, folders 0700. Whoever makes the folder owns it, and containers run as that user; what
root makes belongs to the image's own user instead, so that no container runs as root.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from copra_fl.config import ConfigError

#: the user of the image (Dockerfile)
IMAGE_USER = 10001


@dataclass(frozen=True)
class ClientFolder:
    """What one client's machine needs."""

    root: Path

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def key(self) -> Path:
        return self.tls / "node.key"


@dataclass(frozen=True)
class Folder:
    """A deployment's folder; `root` is absolute."""

    root: Path

    @classmethod
    def open(cls, directory: Path) -> Folder:
        """The deployment in `directory`. Raises ConfigError where there is none."""
        folder = cls(directory.absolute())
        if not folder.exists:
            raise ConfigError(f"{directory} holds no deployment; copra-fl deploy init {directory} makes one")
        return folder

    @property
    def exists(self) -> bool:
        """Whether a deployment has been made here."""
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
        """FLWR_HOME of the SuperLink: how `flwr` reaches it, and the nodes that are registered."""
        return self.state / "flower"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def client(self, number: int) -> ClientFolder:
        return ClientFolder(self.root / "clients" / client_name(number))

    def make(self, num_clients: int) -> None:
        """The folders, where they are missing; for their owner alone."""
        clients = [self.client(number) for number in range(num_clients)]
        server = (self.tls.parent, self.tls, self.nodes, self.data, self.state, self.flower_home)
        inner = [each for client in clients for each in (client.root, client.tls, client.data, client.state)]
        for path in (self.root, self.runs, *server, self.root / "clients", *inner):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)

    def hand_over(self) -> None:
        """Give to the image's user what root has made and containers need; what people put into data stays theirs."""
        if os.getuid() != 0:
            return
        for top in (self.root / "server", self.runs, self.root / "clients"):
            for path, inside, names in os.walk(top):
                if Path(path).name == "data":
                    inside.clear()
                    names = []
                for each in (path, *(os.path.join(path, name) for name in names)):
                    os.chown(each, IMAGE_USER, IMAGE_USER)

    @property
    def user(self) -> str:
        """UID:GID that the containers run as."""
        return f"{os.getuid()}:{os.getgid()}" if os.getuid() != 0 else f"{IMAGE_USER}:{IMAGE_USER}"


def client_name(number: int) -> str:
    return f"client-{number}"


def write_private(path: Path, content: bytes) -> None:
    """A file that only its owner can read, never readable by others in between."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)
        file.write(content)
