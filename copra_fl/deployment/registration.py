"""The nodes that a SuperLink lets in: those whose public keys lie in a folder.

Flower registers a node's key through its Control API, and keeps it in its database. `nodes.json` in FLWR_HOME
says which file became which node, so that a key that is gone from the folder is unregistered: its node is turned away.
It runs where the SuperLink runs, with Flower's own command line and the connection in FLWR_HOME.
"""

from __future__ import annotations

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

KNOWN = "nodes.json"
LOOK_SECONDS = 3


def keep_registered(nodes: Path, ready: threading.Event) -> None:
    """Make the SuperLink's nodes those of the keys in `nodes`, now and whenever these change; `ready` once it is so."""
    while True:
        update(nodes)
        ready.set()
        time.sleep(LOOK_SECONDS)


def update(nodes: Path) -> None:
    """Unregister the nodes whose keys are not in `nodes` any more, register those that are new."""
    keys = {path.stem: path.read_text(encoding="utf-8") for path in sorted(nodes.glob("*.pub"))}
    known = read_known(Path(os.environ["FLWR_HOME"]))
    for name, node in list(known.items()):
        if keys.get(name) != node["key"] and _done(f"unregistering {name}", flwr("unregister", node["id"])):
            del known[name]
            _write_known(known)
    for name in keys.keys() - known.keys():
        answer = flwr("register", str(nodes / f"{name}.pub"), "--name", name)
        if _done(f"registering {name}", answer):
            known[name] = {"id": str(answer["node-id"]), "key": keys[name]}
            _write_known(known)


def read_known(home: Path) -> dict[str, dict[str, str]]:
    """Name -> id and public key of the nodes that are registered; `home` is the SuperLink's FLWR_HOME."""
    path = home / KNOWN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_known(known: dict[str, dict[str, str]]) -> None:
    path = Path(os.environ["FLWR_HOME"]) / KNOWN
    atomic_write(path, json.dumps(known, indent=2) + "\n")


def _done(what: str, answer: dict[str, Any]) -> bool:
    """Whether Flower did it, which is logged too."""
    log.info("%s: %s", what, "done" if answer["success"] else answer.get("error-message", "failed"))
    return bool(answer["success"])


def flwr(command: str, *arguments: str) -> dict[str, Any]:
    """What ``flwr supernode COMMAND`` answers."""
    words = [str(Path(sys.executable).parent / "flwr"), "supernode", command, *arguments, "--format", "json"]
    output = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    try:
        return json.loads(output)
    except ValueError:
        return {"success": False}
