"""The side of the server: it relays keys and shares, and unmasks the sum. It checks what it relays.

Every function takes and returns plain data. A node whose message is refused has dropped out at that step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from copra_fl.secure_aggregation import shamir
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.secure_aggregation.keys import bind, public_of
from copra_fl.secure_aggregation.masks import add_pairwise, mask
from copra_fl.secure_aggregation.messages import Keys, Revealed, SealedShares
from copra_fl.secure_aggregation.node import pairwise_key, self_mask_key
from copra_fl.secure_aggregation.roster import Roster, check_list, commitment_to


def list_nodes(
    run: str,
    server_round: int,
    share: float,
    keys: Iterable[Keys],
    clients: Mapping[int, Sequence[int]] = MappingProxyType({}),
    config: str = "",
) -> Roster:
    """After step 1: return the list of nodes (`Roster`). `clients` of nodes that are not in it are left out.

    Raises SecureAggregationError for fewer than 2 nodes, and for a node or key twice.
    """
    listed = tuple(sorted(keys, key=lambda one: one.node))
    trained = {one.node: tuple(clients[one.node]) for one in listed if one.node in clients}
    roster = Roster(run, server_round, share, listed, trained, config)
    check_list(roster)
    return roster


def check_shares(roster: Roster, node: int, messages: Sequence[SealedShares]) -> None:
    """Raise SecureAggregationError unless `node` has sent one message to each of its holders."""
    if {message.sender for message in messages} != {node} or (
        sorted(message.receiver for message in messages) != list(roster.holders(node))
    ):
        raise SecureAggregationError(f"node {node} has not sent one share to each of its neighbours")


@dataclass(frozen=True)
class Relay:
    """The state of the server after step 2.

    Attributes:
        roster: the nodes of the round.
        shares: node that has sent shares -> receiver -> message.
    """

    roster: Roster
    shares: Mapping[int, Mapping[int, SealedShares]]

    @classmethod
    def of(cls, roster: Roster, sent: Mapping[int, Sequence[SealedShares]]) -> Relay:
        """Return the state after the checked shares `sent` by node.

        Raises SecureAggregationError if so few nodes have sent shares that a secret could not be rebuilt.
        """
        relay = cls(roster, {node: {m.receiver: m for m in messages} for node, messages in sent.items()})
        relay.check_number(sent.keys(), "sent shares")
        return relay

    def check_number(self, nodes: Iterable[int], done: str) -> None:
        """Raise SecureAggregationError if too few `nodes` have `done` something, in all or around one of them."""
        present = set(nodes)
        if len(present) < self.roster.min_nodes:
            raise SecureAggregationError(
                f"{len(present)} of {len(self.roster.keys)} nodes have {done}; secure-threshold = "
                f"{self.roster.share:g} needs {self.roster.min_nodes}"
            )
        for node in sorted(self.shares):
            number, needed = len(present.intersection(self.roster.holders(node))), self.roster.threshold(node)
            if number < needed:
                raise SecureAggregationError(
                    f"{number} of the nodes that hold shares of node {node} have {done}; {needed} are needed"
                )

    def for_receiver(self, node: int) -> list[SealedShares]:
        """Return the messages that `node` gets in step 3, with the vectors still to come."""
        return [self.shares[sender][node] for sender in sorted(self.shares) if sender in self.roster.neighbours[node]]

    def wrong_shares(self, revealed: Revealed, survivors: Iterable[int]) -> str:
        """Return why the shares that a node has revealed are refused; empty if all are right."""
        node, alive = revealed.node, set(survivors)
        owners = {owner for owner in self.shares if node in self.shares[owner]}
        if set(revealed.seeds) != owners & alive or set(revealed.keys) != owners - alive:
            return f"node {node} has not revealed one share of each of its neighbours"
        kinds = (("seed", revealed.seeds), ("key", revealed.keys))
        for kind, shares in kinds:
            for owner, share in sorted(shares.items()):
                message = self.shares[owner][node]
                announced = message.seed_digest if kind == "seed" else message.key_digest
                if bind("share", kind, self.roster.context, owner, node, share) != announced:
                    return f"node {node} has revealed a wrong share of the {kind} of node {owner}"
        return ""

    def can_unmask(self, revealed: Iterable[int]) -> bool:
        """Return whether the nodes that have revealed correct shares are enough for every secret."""
        present = set(revealed)
        return all(
            len(present.intersection(self.roster.holders(node))) >= self.roster.threshold(node) for node in self.shares
        )

    def unmask(self, vectors: Mapping[int, np.ndarray], revealed: Sequence[Revealed], inputs: bytes) -> np.ndarray:
        """After step 5: return the sum of the vectors without masks, (size,) uint64.

        Args:
            vectors: survivor -> its masked vector, all of one size.
            revealed: correct shares (`wrong_shares`).
            inputs: digest of what the nodes have computed their vectors from.

        Raises SecureAggregationError for too few shares of a secret, and for a node whose shares do not give the secret
        that it has announced.
        """
        total = np.asarray(np.stack(list(vectors.values())).sum(axis=0, dtype=np.uint64))
        for node in sorted(self.shares):
            if node in vectors:
                shares = {one.node: one.seeds[node] for one in revealed if node in one.seeds}
                seed = self._rebuild(node, shares, "seed")
                total -= mask(self_mask_key(self.roster, node, seed), len(total))
            else:
                shares = {one.node: one.keys[node] for one in revealed if node in one.keys}
                private = self._rebuild(node, shares, "key")
                for other in vectors.keys() & set(self.roster.neighbours[node]):
                    # the mask that `node` would have added cancels the one that `other` has added
                    add_pairwise(total, pairwise_key(self.roster, node, other, private, inputs), node, other)
        return total

    def _rebuild(self, node: int, shares: Mapping[int, bytes], kind: str) -> bytes:
        """Return a secret of `node` from its shares, checked against what `node` has announced in step 1."""
        threshold, keys = self.roster.threshold(node), self.roster.by_node[node]
        if len(shares) < threshold:
            raise SecureAggregationError(
                f"{len(shares)} shares of the {kind} of node {node} have been revealed; {threshold} are needed"
            )
        try:
            secret = shamir.combine(dict(sorted(shares.items())[:threshold]))
        except ValueError:
            secret = b""
        if kind == "seed":
            right = commitment_to(secret, self.roster.run, self.roster.server_round, node) == keys.commitment
        else:
            right = bool(secret) and public_of(secret) == keys.mask_key
        if not right:
            raise SecureAggregationError(f"node {node} has shared another {kind} than the one it has announced")
        return secret
