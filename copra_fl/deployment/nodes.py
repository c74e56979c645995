"""The nodes of a running deployment, as Flower's own command line in the SuperLink's container tells of them."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from copra_fl.deployment.compose_command import Engine
from copra_fl.deployment.layout import Folder
from copra_fl.deployment.registration import read_known

#: the connection in the SuperLink's FLWR_HOME
CONNECTION = "deployment"


@dataclass(frozen=True)
class Node:
    """
    Attributes:
        name: of its key's file; of a node without a registered key its id.
        status: Flower's word: registered, online or offline.
        since: when it came to be so, in UTC; empty for a node that has never connected.
    """

    name: str
    id: str
    status: str
    since: str


def write_connection(folder: Folder, insecure: bool) -> None:
    """How `flwr` reaches the SuperLink, from inside its container."""
    trust = "insecure = true" if insecure else 'root-certificates = "/tls/ca.crt"'
    (folder.flower_home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "localhost:8000"\n{trust}\n',
        encoding="utf-8",
    )


def find(containers: Engine) -> list[Node] | None:
    """The deployment's nodes; None while the SuperLink does not answer."""
    try:
        answer = json.loads(containers.in_superlink("flwr", "supernode", "list", CONNECTION, "--format", "json"))
    except (subprocess.CalledProcessError, ValueError):
        return None
    return named(answer, read_known(containers.folder.flower_home))


def named(answer: dict[str, Any], known: dict[str, dict[str, str]]) -> list[Node] | None:
    """The nodes in what ``flwr supernode list`` answers, named after their keys in `known`; None for no success."""
    if not answer["success"]:
        return None
    names = {node["id"]: name for name, node in known.items()}
    found = []
    for node in answer["nodes"]:
        if node["status"] != "unregistered":
            since = {"online": node["online-at"], "offline": node["offline-at"]}.get(node["status"], "")
            found.append(Node(names.get(node["node-id"], node["node-id"]), node["node-id"], node["status"], since))
    return sorted(found, key=lambda node: node.name)


def words(found: list[Node]) -> str:
    """Like ``client-0 online, client-1 registered``."""
    return ", ".join(f"{node.name} {node.status}" for node in found) or "no node"
