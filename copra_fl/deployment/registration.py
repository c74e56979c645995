"""Registration of nodes: the SuperLink accepts the nodes with public keys in a folder.

Flower registers a node's key through its Control API and keeps it in its database. It registers no key twice, also
after the node was unregistered. So a node whose key file is removed stays registered with Flower, and the API gate
rejects its requests. If the key file is put back, under any name, the gate admits the same node again. `nodes.json` in
FLWR_HOME lists all registered nodes. This module runs beside the SuperLink, with Flower's own command line and the
connection in FLWR_HOME.

The server app reads `nodes.json` too (`bound_partitions`): the node with the key client-N.pub is client N, whatever it
says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copra_fl.config import toml_value
from copra_fl.files import atomic_write

if TYPE_CHECKING:  # slow to import
    from copra_fl.deployment.node_keys import NodeKeys

log = logging.getLogger(__name__)

#: name of the `flwr` connection in FLWR_HOME
CONNECTION = "deployment"
#: name of the file in FLWR_HOME that records the registered nodes
KNOWN = "nodes.json"
POLL_SECONDS = 3
#: environment variable with the folder of nodes.json, for the server app; not set if nodes need no keys
VARIABLE = "COPRA_FL_NODES"
#: the names of keys that belong to one client: what `copra-fl deploy init` makes
CLIENT_KEY = re.compile(r"client-(\d+)")


@dataclass(frozen=True)
class RegisteredNode:
    """A node that Flower has registered.

    Attributes:
        id: Flower's id of the node.
        key: its public key, as in a .pub file.
        name: name of its key file, without suffix; empty while there is no such file, and the node is shut out.
    """

    id: str
    key: str
    name: str


def write_connection(home: Path, port: int, ca: str | None) -> None:
    """Write the `flwr` connection to this machine's SuperLink into its FLWR_HOME, `home`.

    `ca` is the path of the CA's certificate; None for a SuperLink without TLS.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    trust = "insecure = true" if ca is None else f"root-certificates = {toml_value(ca)}"
    atomic_write(
        home / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "localhost:{port}"\n{trust}\n',
    )


def keep_registered(nodes: Path, keys: NodeKeys) -> None:
    """Register the keys in the folder `nodes`, admit them in `keys`, then follow changes of the folder for ever.

    An error is logged, and the next round tries again: the nodes that are registered stay admitted.
    """
    registered = read_registered(flower_home())
    while True:
        try:
            try:
                update(nodes, registered)
            finally:
                keys.replace({node.name: node.key for node in registered if node.name})
        except Exception:
            log.exception("the nodes are not registered as %s says; next try in %d s", nodes, POLL_SECONDS)
        time.sleep(POLL_SECONDS)


def update(nodes: Path, registered: list[RegisteredNode]) -> None:
    """Name the `registered` nodes by their key files in the folder `nodes`, then register the new keys.

    For a node with a key file that cannot be read nothing changes. nodes.json follows `registered`, which is right even
    where the file cannot be written.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # slow to import

    from copra_fl.secure_aggregation.keys import normal_identity

    files: dict[bytes, list[str]] = {}
    for name, text in read_keys(nodes, {node.name: node.key for node in registered}).items():
        try:
            files.setdefault(normal_identity(text.encode()), []).append(name)
        except (ValueError, UnsupportedAlgorithm) as error:
            log.warning("the key file %s.pub has no public key: %s", name, error)
    for names in files.values():
        if len(names) > 1:
            log.warning("the key files of %s have the same key, which is one node's", ", ".join(names))

    def named(node: RegisteredNode) -> RegisteredNode:
        names = files.pop(normal_identity(node.key.encode()), [""])
        return node if node.name in names else replace(node, name=names[0])

    registered[:] = [named(node) for node in registered]
    _write_registered(registered)
    for key, (name, *_) in files.items():
        answer = flwr("register", str(nodes / f"{name}.pub"), "--name", name)
        if _succeeded(f"registering {name}", answer):
            registered.append(RegisteredNode(str(answer["node-id"]), key.decode(), name))
            _write_registered(registered)


def read_keys(nodes: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return name -> text of the key files in the folder `nodes`; that in `known` of a file that cannot be read."""
    keys = {}
    for path in sorted(path for path in nodes.iterdir() if path.suffix == ".pub"):
        try:
            keys[path.stem] = path.read_text(encoding="utf-8")
        except FileNotFoundError:  # removed just now
            continue
        except (OSError, UnicodeDecodeError) as error:
            log.warning("the key file %s cannot be read, so nothing changes for its node: %s", path, error)
            if path.stem in known:
                keys[path.stem] = known[path.stem]
    return keys


def flower_home() -> Path:
    """Return the SuperLink's FLWR_HOME."""
    return Path(os.environ["FLWR_HOME"])


def bound_partitions() -> dict[int, int]:
    """Return node id -> partition-id of the nodes that are registered as client-N; empty if nodes need no keys."""
    if VARIABLE not in os.environ:
        return {}
    nodes = read_registered(Path(os.environ[VARIABLE]))
    matches = {int(node.id): CLIENT_KEY.fullmatch(node.name) for node in nodes}
    return {node: int(match[1]) for node, match in matches.items() if match}


def shut_out() -> set[int]:
    """Return the ids of the nodes whose keys were removed; empty if nodes need no keys.

    Flower counts such a node as connected until it misses its heartbeat.
    """
    if VARIABLE not in os.environ:
        return set()
    return {int(node.id) for node in read_registered(Path(os.environ[VARIABLE])) if not node.name}


def read_registered(home: Path) -> list[RegisteredNode]:
    """Return all nodes that were ever registered; `home` is the SuperLink's FLWR_HOME."""
    path = home / KNOWN
    return parse_registered(path.read_text(encoding="utf-8")) if path.exists() else []


def parse_registered(text: str) -> list[RegisteredNode]:
    """Return the nodes in the `text` of nodes.json, also of an earlier one: name -> id and key."""
    content = json.loads(text)
    if isinstance(content, dict):
        content = [{"name": name, **node} for name, node in content.items()]
    return [RegisteredNode(**node) for node in content]


def fingerprint(key: str) -> str:
    """Return the fingerprint of a public key in OpenSSH's format, as ``ssh-keygen -l`` prints it; empty without key."""
    if not key:
        return ""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _write_registered(nodes: list[RegisteredNode]) -> None:
    """Write nodes.json, unless it has these nodes."""
    if nodes != read_registered(flower_home()):
        atomic_write(flower_home() / KNOWN, json.dumps([asdict(node) for node in nodes], indent=2) + "\n")


def _succeeded(action: str, answer: dict[str, Any]) -> bool:
    """Log the outcome of `action` and return True if Flower reports success."""
    log.info("%s: %s", action, "done" if answer["success"] else answer.get("error-message", "failed"))
    return bool(answer["success"])


def flwr(command: str, *arguments: str) -> dict[str, Any]:
    """Run ``flwr supernode COMMAND`` and return its JSON answer; without one, ``{"success": False}``."""
    command_line = [str(Path(sys.executable).parent / "flwr"), "supernode", command, *arguments, "--format", "json"]
    output = subprocess.run(command_line, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    try:
        return json.loads(output)
    except ValueError:
        return {"success": False}
