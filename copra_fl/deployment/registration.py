"""Registration of nodes: the SuperLink accepts the nodes with public keys in a folder.

Flower registers a node's key through its Control API and keeps it in its database. `nodes.json` in FLWR_HOME records
which key file became which node, so that a node is unregistered, and rejected from then on, when its key file is
removed. This module runs beside the SuperLink, with Flower's own command line and the connection in FLWR_HOME.

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
    while True:
        try:
            try:
                update(nodes)
            finally:
                keys.replace({name: node["key"] for name, node in read_known(flower_home()).items()})
        except Exception:
            log.exception("the nodes are not registered as %s says; next try in %d s", nodes, POLL_SECONDS)
        time.sleep(POLL_SECONDS)


def update(nodes: Path) -> None:
    """Unregister nodes with keys that are gone from `nodes` or have changed, then register the new keys.

    For a node with a key file that cannot be read nothing changes.
    """
    known = read_known(flower_home())
    keys = {}
    for path in sorted(path for path in nodes.iterdir() if path.suffix == ".pub"):
        try:
            keys[path.stem] = path.read_text(encoding="utf-8")
        except FileNotFoundError:  # removed just now
            continue
        except (OSError, UnicodeDecodeError) as error:
            log.warning("the key file %s cannot be read, so nothing changes for its node: %s", path, error)
            if path.stem in known:
                keys[path.stem] = known[path.stem]["key"]
    for name, node in list(known.items()):
        if keys.get(name) != node["key"] and _succeeded(f"unregistering {name}", flwr("unregister", node["id"])):
            del known[name]
            _write_known(known)
    for name in keys.keys() - known.keys():
        answer = flwr("register", str(nodes / f"{name}.pub"), "--name", name)
        if _succeeded(f"registering {name}", answer):
            known[name] = {"id": str(answer["node-id"]), "key": keys[name]}
            _write_known(known)


def flower_home() -> Path:
    """Return the SuperLink's FLWR_HOME."""
    return Path(os.environ["FLWR_HOME"])


def bound_partitions() -> dict[int, int]:
    """Return node id -> partition-id of the nodes that are registered as client-N; empty if nodes need no keys."""
    if VARIABLE not in os.environ:
        return {}
    known = read_known(Path(os.environ[VARIABLE]))
    matches = {int(node["id"]): CLIENT_KEY.fullmatch(name) for name, node in known.items()}
    return {node: int(match[1]) for node, match in matches.items() if match}


def read_known(home: Path) -> dict[str, dict[str, str]]:
    """Return name -> id and public key of the registered nodes; `home` is the SuperLink's FLWR_HOME."""
    path = home / KNOWN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def fingerprint(key: str) -> str:
    """Return the fingerprint of a public key in OpenSSH's format, as ``ssh-keygen -l`` prints it; empty without key."""
    if not key:
        return ""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _write_known(known: dict[str, dict[str, str]]) -> None:
    atomic_write(flower_home() / KNOWN, json.dumps(known, indent=2) + "\n")


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
