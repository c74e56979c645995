"""The list of the nodes of a round, and everything that follows from it: context, graph, thresholds.

Server and nodes derive all of it from the signed keys of step 1. Everything later is bound to the context, a hash of
run, round, threshold, configuration, list and clients, so nothing of another run, round or list fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.secure_aggregation.keys import KEY_BYTES, bind, is_signed
from copra_fl.secure_aggregation.messages import Keys
from copra_fl.secure_aggregation.neighbours import CORRUPT, SPARSE_FROM, degree, neighbours, threshold_of


@dataclass(frozen=True)
class Roster:
    """The nodes of one round.

    Attributes:
        run: id of the run.
        server_round: the round, from 1.
        share: share of its holders that rebuilds a secret, and of the nodes that must not drop out.
        keys: of all nodes, sorted by number.
        clients: node -> the clients that it trains in this round; empty in a private run, where nodes may not learn who
            was sampled, and where each vector has noise.
        config: digest of the configuration that all nodes train with.
    """

    run: str
    server_round: int
    share: float
    keys: tuple[Keys, ...]
    clients: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    config: str = ""

    @cached_property
    def by_node(self) -> dict[int, Keys]:
        return {keys.node: keys for keys in self.keys}

    @cached_property
    def context(self) -> bytes:
        """Hash of everything that the nodes must agree on."""
        signed = [
            part for keys in self.keys for part in (signed_text(self.run, self.server_round, keys), keys.identity)
        ]
        clients = [bind("clients", node, *self.clients[node]) for node in sorted(self.clients)]
        return bind(
            "context", self.run, self.server_round, repr(self.share), self.config, len(signed), *signed, *clients
        )

    @cached_property
    def neighbours(self) -> dict[int, tuple[int, ...]]:
        """Node -> its neighbours. The context decides the order on the ring, so that no single node or server does."""
        ring = sorted(self.by_node, key=lambda node: bind("ring", self.context, node))
        return neighbours(ring, degree(len(ring), self.share))

    def holders(self, node: int) -> tuple[int, ...]:
        """Return the nodes that hold shares of the secrets of `node`: its neighbours and itself."""
        return tuple(sorted((node, *self.neighbours[node])))

    def threshold(self, node: int) -> int:
        """Return the number of shares that rebuild a secret of `node`."""
        return threshold_of(self.share, len(self.holders(node)))

    @property
    def min_nodes(self) -> int:
        """Number of nodes without which there is no sum."""
        return threshold_of(self.share, len(self.keys))

    def num_honest(self, num_colluding: int) -> int:
        """Return the least number of honest nodes in a sum that a lying server can get, with so many nodes on its side.

        They are in the sum as well. If they are so many that two lists of survivors could be signed, or more than a
        sparse graph is made for, the server may find the vector of a single node.

        Raises SecureAggregationError if all nodes of a sum could be on its side.
        """
        if num_colluding >= self.min_nodes:
            raise SecureAggregationError(
                f"dp-colluding-nodes = {num_colluding} must be less than the {self.min_nodes} nodes that a sum has at "
                "least: their shares of the noise do not count"
            )
        number = len(self.keys)
        has_one_list = num_colluding < 2 * self.min_nodes - number
        fits_graph = number < SPARSE_FROM or num_colluding <= CORRUPT * number
        return self.min_nodes - num_colluding if has_one_list and fits_graph else 1


def signed_text(run: str, server_round: int, keys: Keys) -> bytes:
    """Return what a node signs in step 1."""
    return bind("keys", run, server_round, keys.node, keys.mask_key, keys.share_key, keys.commitment)


def survivors_text(roster: Roster, survivors: Iterable[int]) -> bytes:
    """Return what a node signs in step 4."""
    return bind("survivors", roster.context, *sorted(survivors))


def commitment_to(seed: bytes, run: str, server_round: int, node: int) -> bytes:
    """Return the commitment to a self seed."""
    return bind("self seed", run, server_round, node, seed)


def check_keys(run: str, server_round: int, keys: Keys, trusted: Mapping[int, bytes] | None = None) -> None:
    """Raise SecureAggregationError unless `keys` are well formed and signed for this run and round.

    `trusted` are the public keys of the nodes that may take part; None: any key that signs.
    """
    name = f"node {keys.node}"
    if any(len(key) != KEY_BYTES for key in (keys.mask_key, keys.share_key, keys.commitment)):
        raise SecureAggregationError(f"{name} sends keys of a wrong length")
    if trusted is not None and keys.node not in trusted:
        raise SecureAggregationError(f"{name} is not registered: its public key is not among the peers")
    if trusted is not None and keys.identity != trusted[keys.node]:
        raise SecureAggregationError(f"{name} signs with another key than the registered one")
    if not is_signed(keys.identity, keys.signature, signed_text(run, server_round, keys)):
        raise SecureAggregationError(
            f"the keys of {name} are not signed by it for round {server_round} of run {run}: they were changed, or "
            "belong to another round"
        )


def check_list(roster: Roster) -> None:
    """Raise SecureAggregationError for a list of fewer than 2 nodes, or with a node or key twice."""
    if len(roster.keys) < 2:
        raise SecureAggregationError(
            f"{len(roster.keys)} node takes part; secure aggregation needs at least 2, because the sum of one is its "
            "own update"
        )
    if not 0.5 < roster.share <= 1:
        raise SecureAggregationError(f"secure-threshold = {roster.share:g} must be more than 0.5 and at most 1")
    columns = ("node", "mask_key", "share_key", "identity")
    for column in columns:
        values = [getattr(keys, column) for keys in roster.keys]
        if len(set(values)) < len(values):
            twice = next(keys.node for keys in roster.keys if values.count(getattr(keys, column)) > 1)
            raise SecureAggregationError(f"the list of nodes has the {column.replace('_', ' ')} of node {twice} twice")
    if [keys.node for keys in roster.keys] != sorted(keys.node for keys in roster.keys):
        raise SecureAggregationError("the list of nodes is not sorted")
