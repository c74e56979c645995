"""Handshake with the nodes: all nodes before the first round, nodes that connect later before the next round."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.logger import log

from copra_fl import plugins, provenance, wire
from copra_fl.config import Config
from copra_fl.deployment import registration
from copra_fl.events import emit
from copra_fl.wording import foreign, listed
from server.audit import AuditLog
from server.errors import FederationError
from server.messaging import exchange

CLIENTS = Path(__file__).parent.parent / "clients"


def register_nodes(grid: Grid, config: Config, audit: AuditLog, has_rounds: bool = True) -> dict[int, wire.Handshake]:
    """Ask every node for its handshake, and return node id -> handshake.

    `has_rounds` says if a round is still to be trained: a node that may train no more can take part without one.

    After a fault Flower counts nodes as connected that are gone; until node-timeout-s has passed they may come back.

    A node does not fit if it fails, is silent, rejects the run, or has other code, another base model, other labels, or
    the partition-id of another node or of another node's key. With ``failures = "tolerant"`` it is left out with a
    warning.

    Raises FederationError for a node that does not fit and for a client that no node can host (strict), and for fewer
    than min-nodes nodes after node-timeout-s.
    """
    deadline = time.monotonic() + config.federation.node_timeout_s
    while True:
        nodes = wait_for_nodes(grid, config, deadline)
        replies = query(grid, config, nodes, config.federation.round_timeout_s, has_rounds)
        gone = [
            reply.metadata.src_node_id
            for reply in replies
            if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE
        ]
        if not gone or time.monotonic() > deadline:
            break
        log(INFO, "nodes %s are gone; all nodes are asked again", gone)
        time.sleep(1)
    handshakes = {}
    for reply in replies:
        with leave_out(config, audit):
            handshakes[reply.metadata.src_node_id] = read(reply)
    with leave_out(config, audit):
        check_silent(nodes, replies, f"round-timeout-s = {config.federation.round_timeout_s:g} s")
    admitted = admit(handshakes, config, audit)
    if config.federation.failures == "strict":
        check_all_clients(admitted)
    if len(admitted) < config.federation.min_nodes:
        raise FederationError(
            f"{len(admitted)} of {len(nodes)} nodes fit; min-nodes = {config.federation.min_nodes}. The log has the "
            "reason of each node that was left out"
        )
    return admitted


@contextmanager
def leave_out(config: Config, audit: AuditLog) -> Iterator[None]:
    """Turn a FederationError inside the block into a warning that a node is left out, if failures are tolerated."""
    try:
        yield
    except FederationError as error:
        if config.federation.failures == "strict":
            raise
        log(WARNING, "a node is left out: %s", error)
        emit("note", text=f"a node is left out: {error}")
        audit.leave_out(str(error))


def admit(handshakes: Mapping[int, wire.Handshake], config: Config, audit: AuditLog) -> dict[int, wire.Handshake]:
    """Return the nodes that fit together; labels and number of clients are those of most nodes that take part."""
    willing = [handshake for handshake in handshakes.values() if not handshake.rejection_reason]
    votes = Counter((handshake.num_clients, tuple(handshake.label_names)) for handshake in willing)
    usual = max(votes, key=votes.__getitem__, default=(0, ()))
    admitted = Admitted.of({})
    for node, handshake in handshakes.items():
        with leave_out(config, audit):
            check_node(node, handshake, admitted, usual, config)
            admitted.add(node, handshake)
    return admitted.nodes


@dataclass(frozen=True)
class Admitted:
    """The nodes that fit, indexed for the checks of the next one.

    Attributes:
        nodes: node -> handshake.
        node_of: partition-id -> node.
        counts: client -> its training and validation examples.
    """

    nodes: dict[int, wire.Handshake]
    node_of: dict[int, int]
    counts: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, nodes: Mapping[int, wire.Handshake]) -> Admitted:
        admitted = cls({}, {}, {})
        for node, handshake in nodes.items():
            admitted.add(node, handshake)
        return admitted

    def add(self, node: int, handshake: wire.Handshake) -> None:
        self.nodes[node] = handshake
        self.node_of[handshake.partition] = node
        self.counts.update(handshake.counts)


def wait_for_nodes(grid: Grid, config: Config, deadline: float) -> list[int]:
    """Return the connected nodes. Raises FederationError if there are fewer than min-nodes at the deadline."""
    while len(nodes := sorted(connected_nodes(grid))) < config.federation.min_nodes:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} nodes connected within node-timeout-s = {config.federation.node_timeout_s:g} s; "
                f"min-nodes = {config.federation.min_nodes}"
            )
        time.sleep(0.5)
    return nodes


def connected_nodes(grid: Grid) -> set[int]:
    """Return the connected nodes, without those that the gate shuts out."""
    return set(grid.get_node_ids()) - registration.shut_out()


def query(grid: Grid, config: Config, nodes: Iterable[int], timeout: float, has_rounds: bool = True) -> list[Message]:
    """Send the handshake query to `nodes` and return the replies that come within `timeout` seconds."""
    messages = [Message(wire.pack_config(config, has_rounds), node, MessageType.QUERY) for node in nodes]
    return exchange(grid, messages, timeout)


def check_silent(nodes: Iterable[int], replies: Iterable[Message], limit: str) -> None:
    """Raise FederationError that names the `nodes` without a reply; `limit` says how long the server has waited."""
    if silent := set(nodes) - {reply.metadata.src_node_id for reply in replies}:
        raise FederationError(f"nodes {sorted(silent)} did not answer the handshake within {limit}")


def read(reply: Message) -> wire.Handshake:
    """Return the handshake in a reply. Raises FederationError for an invalid reply."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        raise FederationError(f"node {node} failed at the handshake: {reply.error.reason}")
    try:
        return wire.unpack_handshake(reply.content)
    except Exception as error:  # a node can have sent anything
        raise FederationError(f"node {node} sent an unreadable handshake: {error!r}") from error


def admit_late_nodes(
    grid: Grid, config: Config, nodes: dict[int, wire.Handshake], audit: AuditLog
) -> dict[int, wire.Handshake]:
    """Return `nodes` and the nodes that have connected since; one that does not fit is left out with a warning.

    A node without a key comes back under another id: it replaces the one that is gone. A silent node costs
    node-timeout-s.
    """
    admitted, connected, timeout = dict(nodes), connected_nodes(grid), config.federation.node_timeout_s
    late = sorted(connected - nodes.keys())
    replies = query(grid, config, late, timeout)
    for reply in replies:
        node = reply.metadata.src_node_id
        with leave_out(config, audit):
            handshake = read(reply)
            others = {
                other: known
                for other, known in admitted.items()
                if other in connected or known.partition != handshake.partition
            }
            known = next(iter(nodes.values()))
            usual = known.num_clients, tuple(known.label_names)
            check_node(node, handshake, Admitted.of(others), usual, config)
            admitted = others | {node: handshake}
            log(INFO, "node %s (partition-id %s) has joined", node, handshake.partition)
    with leave_out(config, audit):
        check_silent(late, replies, f"node-timeout-s = {timeout:g} s")
    return admitted


def check_node(
    node: int,
    handshake: wire.Handshake,
    others: Admitted,
    usual: tuple[int, tuple[str, ...]],
    config: Config,
) -> None:
    """Raise FederationError unless a node runs the server's code and fits to the `others`.

    `usual` are the number of clients and the labels of the other nodes.
    """
    name = f"node {node} (partition-id {handshake.partition})"
    check_identity(name, node, handshake)
    check_code(name, handshake, config)
    check_agreement(name, handshake, usual, config)
    if twin := others.node_of.get(handshake.partition):
        raise FederationError(f"{name} has the same partition-id as node {twin}")
    for client, count in handshake.counts.items():
        check_count(name, handshake, client, count, config)
        if (other := others.counts.get(client, count)) != count:
            raise FederationError(f"{name} has {count} examples of client {client}, other nodes {other}")


def check_all_clients(nodes: Mapping[int, wire.Handshake]) -> None:
    """Raise FederationError if there is a client that none of `nodes` can host."""
    clients = range(next(iter(nodes.values())).num_clients)
    if homeless := set(clients).difference(*(handshake.num_examples for handshake in nodes.values())):
        raise FederationError(
            f"no connected node can host the clients [{listed(sorted(homeless))}]; the connected partition-ids are "
            f"[{listed(sorted(handshake.partition for handshake in nodes.values()))}]"
        )


def check_identity(name: str, node: int, handshake: wire.Handshake) -> None:
    """Raise FederationError if a node claims another client than the one that its key is registered for."""
    bound = registration.bound_partitions()
    if (partition := bound.get(node, handshake.partition)) != handshake.partition:
        raise FederationError(f"{name} has the key of client-{partition}; set partition-id={partition} on that node")
    if node not in bound and handshake.partition in bound.values():
        raise FederationError(f"{name} claims the partition-id of client-{handshake.partition}, whose key it lacks")


def check_code(name: str, handshake: wire.Handshake, config: Config) -> None:
    """Raise FederationError if the node runs other code or plugins than the server, or rejects the run."""
    digest = provenance.library_digest(CLIENTS)
    if handshake.digest != digest:
        raise FederationError(
            f"{name} runs other sources of copra_fl and clients (digest {handshake.digest[:12]}) than the server "
            f"({digest[:12]}); install the same version on both, and look for a stray clients/ folder"
        )
    if handshake.rejection_reason:
        raise FederationError(f"{name} rejected the run: {handshake.rejection_reason}")
    for plugin, digest in plugins.digests(config).items():
        if (other := handshake.plugins.get(plugin, "")) != digest:
            raise FederationError(
                f"{name} has another version of the plugin {plugin} (digest {other[:12]}) than the server "
                f"({digest[:12]}); install the same version on both"
            )


def check_agreement(name: str, handshake: wire.Handshake, usual: tuple[int, tuple[str, ...]], config: Config) -> None:
    """Raise FederationError if labels or number of clients differ from the `usual` ones or the configuration's."""
    num_clients, label_names = usual
    if tuple(handshake.label_names) != label_names:
        raise FederationError(
            f"{name} has the labels {foreign(handshake.label_names)}, other nodes have {list(label_names)}"
        )
    if handshake.num_clients != num_clients:
        raise FederationError(
            f"{name} counts {handshake.num_clients} clients, other nodes {num_clients}; with num-clients = 0 set the "
            "same num-partitions on all nodes"
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
