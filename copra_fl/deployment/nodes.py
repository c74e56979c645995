"""The nodes of a running deployment, listed by Flower's own command line in the SuperLink's container."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from copra_fl.deployment.compose_command import ComposeCommand
from copra_fl.deployment.container_files import read_plain
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.registration import CONNECTION, KNOWN, RegisteredNode, parse_registered
from copra_fl.simulation.superlink import RunFailed
from copra_fl.wording import foreign


@dataclass(frozen=True)
class Node:
    """A node that the SuperLink knows.

    Attributes:
        name: name of its key file, without suffix; for a node without a registered key, its id.
        status: registered, online or offline, as Flower reports it.
        since: UTC time of the last change of `status`; empty for a node that has never connected.
    """

    name: str
    id: str
    status: str
    since: str


def list_nodes(compose: ComposeCommand) -> list[Node] | None:
    """Return the deployment's nodes; None while the SuperLink does not answer."""
    try:
        answer = json.loads(compose.run_in_superlink("flwr", "supernode", "list", CONNECTION, "--format", "json"))
    except (subprocess.CalledProcessError, ValueError):
        return None
    return parse_nodes(answer, _registered(compose.layout))


def wait_until_online(compose: ComposeCommand, num_clients: int, timeout_s: float) -> list[Node]:
    """Wait until the SuperLink answers and `num_clients` nodes are online; return the nodes.

    Raises RunFailed after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        nodes = list_nodes(compose)
        if nodes is not None and sum(node.status == "online" for node in nodes) >= num_clients:
            return nodes
        if time.monotonic() > deadline:
            if nodes is None:
                problem = "the SuperLink does not answer"
            else:
                problem = f"fewer than {num_clients} nodes are online: {describe(nodes)}"
            raise RunFailed(f"after {timeout_s:g} s {problem}; see: copra-fl deploy logs {compose.layout.root}")
        time.sleep(1)


def parse_nodes(answer: dict[str, Any], registered: Sequence[RegisteredNode]) -> list[Node] | None:
    """Return the nodes in the answer of ``flwr supernode list``, sorted by name; None if it reports no success.

    `registered` gives nodes the names of their key files. Nodes without key file are left out.
    """
    if not answer["success"]:
        return None
    names = {node.id: node.name for node in registered}
    nodes = []
    for node in answer["nodes"]:
        name = names.get(node["node-id"], node["node-id"])
        if name and node["status"] != "unregistered":  # by an earlier version
            since = {"online": node["online-at"], "offline": node["offline-at"]}.get(node["status"], "")
            nodes.append(Node(name, node["node-id"], node["status"], since))
    return sorted(nodes, key=lambda node: node.name)


def _registered(layout: DeploymentLayout) -> list[RegisteredNode]:
    """Return what `registration.read_registered` does in the container; nothing if the container has no valid file."""
    try:
        nodes = parse_registered(read_plain(layout.flower_home, KNOWN).decode())
        return [RegisteredNode(str(node.id), "", foreign(node.name)) for node in nodes]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def describe(nodes: Iterable[Node]) -> str:
    """Return a list like ``client-0 online, client-1 registered``."""
    return ", ".join(f"{node.name} {node.status}" for node in nodes) or "no node"
