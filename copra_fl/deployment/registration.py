"""Registration of nodes: the SuperLink accepts the nodes with public keys in a folder.

Flower registers a node's key through its Control API and keeps it in its database. `nodes.json` in FLWR_HOME records
which key file became which node, so that a node is unregistered, and rejected from then on, when its key file is
removed. This module runs beside the SuperLink, with Flower's own command line and the connection in FLWR_HOME.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from copra_fl.files import atomic_write

log = logging.getLogger(__name__)

#: name of the file in FLWR_HOME that records the registered nodes
KNOWN = "nodes.json"
POLL_SECONDS = 3


def keep_registered(nodes: Path, ready: threading.Event) -> None:
    """Register the keys in the folder `nodes`, set `ready`, then follow changes of the folder for ever."""
    while True:
        update(nodes)
        ready.set()
        time.sleep(POLL_SECONDS)


def update(nodes: Path) -> None:
    """Unregister nodes with keys that are gone from `nodes` or have changed, then register the new keys."""
    keys = {path.stem: path.read_text(encoding="utf-8") for path in sorted(nodes.glob("*.pub"))}
    known = read_known(Path(os.environ["FLWR_HOME"]))
    for name, node in list(known.items()):
        if keys.get(name) != node["key"] and _succeeded(f"unregistering {name}", flwr("unregister", node["id"])):
            del known[name]
            _write_known(known)
    for name in keys.keys() - known.keys():
        answer = flwr("register", str(nodes / f"{name}.pub"), "--name", name)
        if _succeeded(f"registering {name}", answer):
            known[name] = {"id": str(answer["node-id"]), "key": keys[name]}
            _write_known(known)


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
    path = Path(os.environ["FLWR_HOME"]) / KNOWN
    atomic_write(path, json.dumps(known, indent=2) + "\n")


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
