"""Handshake with the nodes: all nodes before the first round, nodes that connect later before the next round."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from copra_fl import provenance, wire
from copra_fl.config import Config
from server.errors import FederationError
from server.messaging import exchange

CLIENTS = Path(__file__).parent.parent / "clients"


def register_nodes(grid: Grid, config: Config) -> dict[int, wire.Handshake]:
    """Ask every node for its handshake, and return node id -> handshake.

    After a fault Flower counts nodes as connected that are gone; until node-timeout-s has passed they may come back.

    Raises FederationError for a node that fails, rejects the run, or has other code, another base model, other labels
    or the partition-id of another node; for a client that no node can host (strict); and for fewer than min-nodes nodes
    after node-timeout-s.
    """
    deadline = time.monotonic() + config.federation.node_timeout_s
    while True:
        nodes = wait_for_nodes(grid, config, deadline)
        replies = query(grid, config, nodes)
        gone = [
            reply.metadata.src_node_id
            for reply in replies
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
        ]
        if not gone or time.monotonic() > deadline:
            break
        log(INFO, "nodes %s are gone; all nodes are asked again", gone)
        time.sleep(1)
    handshakes = {reply.metadata.src_node_id: read(reply) for reply in replies}
    if silent := set(nodes) - handshakes.keys():
        raise FederationError(
            f"nodes {sorted(silent)} did not answer the handshake within round-timeout-s = "
            f"{config.federation.round_timeout_s:g} s"
        )
    check_nodes(handshakes, config)
    return handshakes


def wait_for_nodes(grid: Grid, config: Config, deadline: float) -> list[int]:
    """Return the connected nodes. Raises FederationError if there are fewer than min-nodes at the deadline."""
    while len(nodes := sorted(grid.get_node_ids())) < config.federation.min_nodes:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} nodes connected within node-timeout-s = {config.federation.node_timeout_s:g} s; "
                f"min-nodes = {config.federation.min_nodes}"
            )
        time.sleep(0.5)
    return nodes


def query(grid: Grid, config: Config, nodes: Iterable[int]) -> list[Message]:
    """Send the handshake query to `nodes` and return the replies."""
    messages = [Message(wire.pack_config(config), node, MessageType.QUERY) for node in nodes]
    return exchange(grid, messages, config.federation.round_timeout_s)


def read(reply: Message) -> wire.Handshake:
    """Return the handshake in a reply. Raises FederationError for an invalid reply."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        raise FederationError(f"node {node} failed at the handshake: {reply.error.reason}")
    try:
        return wire.unpack_handshake(reply.content)
    except Exception as error:  # a node can have sent anything
        raise FederationError(f"node {node} sent an unreadable handshake: {error!r}") from error


def admit_late_nodes(grid: Grid, config: Config, nodes: dict[int, wire.Handshake]) -> dict[int, wire.Handshake]:
    """Return `nodes` and the nodes that have connected since; an invalid one is left out with a warning.

    A node without a key comes back under another id: it replaces the one that is gone.
    """
    admitted, connected = dict(nodes), set(grid.get_node_ids())
    for reply in query(grid, config, sorted(connected - nodes.keys())):
        node = reply.metadata.src_node_id
        try:
            handshake = read(reply)
            others = {
                other: known
                for other, known in admitted.items()
                if other in connected or known.partition != handshake.partition
            }
            check_nodes(others | {node: handshake}, config)
        except FederationError as error:
            log(WARNING, "a late node is left out: %s", error)
            continue
        admitted = others | {node: handshake}
        log(INFO, "node %s (partition-id %s) has joined", node, handshake.partition)
    return admitted


def check_nodes(handshakes: Mapping[int, wire.Handshake], config: Config) -> None:
    """Raise FederationError unless all nodes run the server's code and form one federation."""
    first = next(iter(handshakes.values()))
    partitions: dict[int, int] = {}
    counts: dict[int, tuple[int, int]] = {}
    for node, handshake in handshakes.items():
        name = f"node {node} (partition-id {handshake.partition})"
        check_code(name, handshake)
        check_agreement(name, handshake, first, config)
        if handshake.partition in partitions:
            raise FederationError(f"{name} has the same partition-id as node {partitions[handshake.partition]}")
        partitions[handshake.partition] = node
        for client, count in handshake.counts.items():
            check_count(name, handshake, client, count, config)
            if counts.setdefault(client, count) != count:
                raise FederationError(f"{name} has {count} examples of client {client}, other nodes {counts[client]}")
    homeless = set(range(first.num_clients)).difference(*(handshake.num_examples for handshake in handshakes.values()))
    if homeless and config.federation.failures == "strict":
        raise FederationError(
            f"no connected node can host the clients {sorted(homeless)}; the connected partition-ids are "
            f"{sorted(partitions)}"
        )


def check_code(name: str, handshake: wire.Handshake) -> None:
    """Raise FederationError if the node runs other code than the server, or rejects the run."""
    digest = provenance.library_digest(CLIENTS)
    if handshake.digest != digest:
        raise FederationError(
            f"{name} runs other sources of copra_fl and clients (digest {handshake.digest[:12]}) than the server "
            f"({digest[:12]}); install the same version on both, and look for a stray clients/ folder"
        )
    if handshake.rejection_reason:
        raise FederationError(f"{name} rejected the run: {handshake.rejection_reason}")


def check_agreement(name: str, handshake: wire.Handshake, first: wire.Handshake, config: Config) -> None:
    """Raise FederationError if labels or number of clients differ from the first node's or the configuration's."""
    if handshake.label_names != first.label_names:
        raise FederationError(f"{name} has the labels {handshake.label_names}, other nodes have {first.label_names}")
    if handshake.num_clients != first.num_clients:
        raise FederationError(
            f"{name} counts {handshake.num_clients} clients, other nodes {first.num_clients}; with num-clients = 0 "
            "set the same num-partitions on all nodes"
        )
    if config.data.num_clients not in (0, handshake.num_clients):
        raise FederationError(
            f"{name} counts {handshake.num_clients} clients, but num-clients = {config.data.num_clients}; set "
            "num-clients = 0 if nodes have their own data"
        )


def check_count(name: str, handshake: wire.Handshake, client: int, count: tuple[int, int], config: Config) -> None:
    """Raise FederationError if a client of a node, or its number of training and validation examples, is impossible."""
    if not 0 <= client < handshake.num_clients or min(count) < 0:
        raise FederationError(f"{name} has {count[0]} and {count[1]} examples of a client {client}")
    if config.data.partitioner == "own" and client != handshake.partition:
        raise FederationError(f"{name} claims client {client}, but with partitioner = 'own' a node is one client")
