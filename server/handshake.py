"""Who takes part: every node is asked before the first round, and those that connect later before the next one."""

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
from server.messaging import exchange
from server.strategy import FederationError

CLIENTS = Path(__file__).parent.parent / "clients"


def greet(grid: Grid, config: Config) -> dict[int, wire.Hello]:
    """Ask every node who it is. Returns node id -> hello.

    After a fault Flower takes nodes to be connected that are not; until node-timeout-s they may come back.

    Raises FederationError for a node that fails, refuses, runs other code, has another base, other labels or a
    partition twice; for a client that no node can host (strict); and for fewer than min-nodes after node-timeout.
    """
    deadline = time.monotonic() + config.federation.node_timeout_s
    while True:
        replies = ask(grid, config, nodes := connected(grid, config, deadline))
        gone = [r.metadata.src_node_id for r in replies if r.has_error() and r.error.code == ErrorCode.NODE_UNAVAILABLE]
        if not gone or time.monotonic() > deadline:
            break
        log(INFO, "nodes %s have gone; all are asked again", gone)
        time.sleep(1)
    hellos = {reply.metadata.src_node_id: read(reply) for reply in replies}
    if silent := set(nodes) - hellos.keys():
        raise FederationError(f"nodes {sorted(silent)} did not answer the hello query")
    check_nodes(hellos, config)
    return hellos


def connected(grid: Grid, config: Config, deadline: float) -> list[int]:
    """The connected nodes. Raises FederationError where they are fewer than min-nodes at the deadline."""
    while len(nodes := sorted(grid.get_node_ids())) < config.federation.min_nodes:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} nodes connected within node-timeout-s = {config.federation.node_timeout_s:g} s; "
                f"min-nodes = {config.federation.min_nodes}"
            )
        time.sleep(0.5)
    return nodes


def ask(grid: Grid, config: Config, nodes: Iterable[int]) -> list[Message]:
    """The hello query and its replies."""
    messages = [Message(wire.pack_config(config), node, MessageType.QUERY) for node in nodes]
    return exchange(grid, messages, config.federation.round_timeout_s)


def read(reply: Message) -> wire.Hello:
    """Raises FederationError for a reply that is none."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        raise FederationError(f"node {node} failed at hello: {reply.error.reason}")
    try:
        return wire.unpack_hello(reply.content)
    except Exception as error:  # a node can have sent anything
        raise FederationError(f"node {node} sent no hello that can be read: {error!r}") from error


def welcome(grid: Grid, config: Config, nodes: dict[int, wire.Hello]) -> dict[int, wire.Hello]:
    """`nodes` and those that have connected since. Who fails or does not fit is named in the log, and left out.

    Without keys a node that comes back has another id: it takes the place of the one that is gone.
    """
    there, connected_now = dict(nodes), set(grid.get_node_ids())
    for reply in ask(grid, config, sorted(connected_now - nodes.keys())):
        node = reply.metadata.src_node_id
        try:
            hello = read(reply)
            others = {n: h for n, h in there.items() if n in connected_now or h.partition != hello.partition}
            check_nodes(others | {node: hello}, config)
        except FederationError as error:
            log(WARNING, "a node that came late is left out: %s", error)
            continue
        there = others | {node: hello}
        log(INFO, "node %s (partition-id %s) has joined", node, hello.partition)
    return there


def check_nodes(hellos: Mapping[int, wire.Hello], config: Config) -> None:
    """Raise FederationError unless all nodes run this code and make up one federation."""
    digest = provenance.library_digest(CLIENTS)
    first = next(iter(hellos.values()))
    partitions: dict[int, int] = {}
    counts: dict[int, tuple[int, int]] = {}
    for node, hello in hellos.items():
        who = f"node {node} (partition-id {hello.partition})"
        if hello.digest != digest:
            raise FederationError(
                f"{who} runs other sources of copra_fl and clients (digest {hello.digest[:12]}) than the server "
                f"({digest[:12]}); install the same version on both, and look for a stray clients/ folder"
            )
        if hello.refusal:
            raise FederationError(f"{who} takes no part: {hello.refusal}")
        if hello.label_names != first.label_names:
            raise FederationError(f"{who} has the labels {hello.label_names}, other nodes have {first.label_names}")
        if hello.num_clients != first.num_clients:
            raise FederationError(
                f"{who} counts {hello.num_clients} clients, other nodes {first.num_clients}; with num-clients = 0 "
                "all nodes need the same num-partitions"
            )
        if config.data.num_clients not in (0, hello.num_clients):
            raise FederationError(
                f"{who} counts {hello.num_clients} clients, but num-clients = {config.data.num_clients}; with nodes' "
                "own data num-clients = 0 is right"
            )
        if hello.partition in partitions:
            raise FederationError(f"{who} has the same partition-id as node {partitions[hello.partition]}")
        partitions[hello.partition] = node
        for client, own in hello.counts.items():
            if not 0 <= client < hello.num_clients or min(own) < 0:
                raise FederationError(f"{who} has {own[0]} and {own[1]} examples of a client {client}")
            if config.data.partitioner == "own" and client != hello.partition:
                raise FederationError(f"{who} claims client {client}, where each node has data of its own")
            if counts.setdefault(client, own) != own:
                raise FederationError(f"{who} has {own} examples of client {client}, other nodes {counts[client]}")
    homeless = set(range(first.num_clients)).difference(*(hello.num_examples for hello in hellos.values()))
    if homeless and config.federation.failures == "strict":
        raise FederationError(
            f"no connected node can host the clients {sorted(homeless)}; connected are the partition-ids "
            f"{sorted(partitions)}"
        )
