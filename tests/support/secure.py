"""A round of secure aggregation in one process: nodes drop out where a test says so, and messages can be changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from copra_fl.secure_aggregation import node, server
from copra_fl.secure_aggregation.keys import new_identity, public_identity
from copra_fl.secure_aggregation.messages import Keys, Revealed, SealedShares
from copra_fl.secure_aggregation.node import Session
from copra_fl.secure_aggregation.roster import Roster

#: what all nodes train from
INPUTS = b"configuration and adapter"


def unchanged(message: Any) -> Any:
    return message


@dataclass
class SecureRound:
    """A round of `num_nodes` nodes, step by step.

    Attributes:
        identities: private keys of the nodes.
        drops: step (1 to 5) -> nodes that do not answer in it.
        received: every byte string that the server has received.
    """

    num_nodes: int
    drops: Mapping[int, Collection[int]] = field(default_factory=dict)
    share: float = 2 / 3
    server_round: int = 1

    def __post_init__(self) -> None:
        self.identities = [new_identity() for _ in range(self.num_nodes)]
        self.trusted = {number: public_identity(identity) for number, identity in enumerate(self.identities)}
        self.received: list[bytes] = []
        self.sessions: dict[int, Session] = {}

    def answering(self, step: int, nodes: Collection[int]) -> list[int]:
        return [number for number in nodes if number not in self.drops.get(step, ())]

    def offer(self) -> list[Keys]:
        """Step 1."""
        answering = self.answering(1, range(self.num_nodes))
        offers = {one: node.offer_keys("run", self.server_round, one, self.identities[one]) for one in answering}
        self.secrets = {one: secrets for one, (secrets, _) in offers.items()}
        keys = [keys for _, keys in offers.values()]
        self.received += [value for one in keys for value in vars(one).values() if isinstance(value, bytes)]
        return keys

    def split(self, roster: Roster) -> server.Relay:
        """Step 2."""
        sent = {}
        for number in self.answering(2, list(roster.by_node)):
            self.sessions[number], sent[number] = node.share_secrets(self.secrets[number], roster, self.trusted)
            server.check_shares(roster, number, sent[number])
            self.received += [message.sealed for message in sent[number]]
        return server.Relay.of(roster, sent)

    def send(
        self, relay: server.Relay, vectors: Mapping[int, np.ndarray],
        change: Callable[[list[SealedShares]], list[SealedShares]] = unchanged,
    ) -> dict[int, np.ndarray]:  # fmt: skip
        """Step 3."""
        masked = {}
        for number in self.answering(3, list(relay.shares)):
            session = node.receive_shares(self.sessions[number], change(relay.for_receiver(number)))
            self.sessions[number], masked[number] = node.mask_vector(session, vectors[number], INPUTS)
            self.received.append(masked[number].tobytes())
        relay.check_number(masked, "sent a vector")
        return masked

    def confirm(self, survivors: Collection[int]) -> dict[int, bytes]:
        """Step 4."""
        signatures = {}
        for one in self.answering(4, survivors):
            self.sessions[one], confirmation = node.confirm(self.sessions[one], survivors, self.identities[one])
            signatures[one] = confirmation.signature
        self.received += signatures.values()
        return signatures

    def reveal(
        self, relay: server.Relay, survivors: Collection[int], change: Callable[[Revealed], Revealed] = unchanged
    ) -> tuple[list[Revealed], list[str]]:
        """Steps 4 and 5: the correct answers, and why the others are refused."""
        signatures = self.confirm(survivors)
        answering = self.answering(5, survivors)
        answers = [change(node.reveal(self.sessions[one], survivors, signatures)) for one in answering]
        self.received += [share for one in answers for share in (*one.seeds.values(), *one.keys.values())]
        reasons = {one.node: relay.wrong_shares(one, survivors) for one in answers}
        return [one for one in answers if not reasons[one.node]], [reason for reason in reasons.values() if reason]

    def total(self, vectors: Mapping[int, np.ndarray]) -> tuple[np.ndarray, list[int]]:
        """All steps: the unmasked sum, and the nodes whose vectors are in it."""
        relay = self.split(server.list_nodes("run", self.server_round, self.share, self.offer()))
        masked = self.send(relay, vectors)
        revealed, _ = self.reveal(relay, masked.keys())
        return relay.unmask(masked, revealed, INPUTS), sorted(masked)


def node_configs_with_peers(folder: Path, num_nodes: int) -> list[dict[str, str | int]]:
    """Return the configs of nodes that know each other's keys; the keys are written to `folder`."""
    (folder / "peers").mkdir()
    configs: list[dict[str, str | int]] = []
    for number in range(num_nodes):
        identity = new_identity()
        (folder / f"node-{number}.key").write_bytes(identity)
        (folder / "peers" / f"client-{number}.pub").write_bytes(public_identity(identity) + b" with a comment\n")
        configs.append({"node-key": str(folder / f"node-{number}.key"), "peers": str(folder / "peers")})
    return configs


def random_vectors(num_nodes: int, size: int = 50, seed: int = 0) -> dict[int, np.ndarray]:
    """Return node -> (size,) uint64 of the whole range."""
    rng = np.random.default_rng(seed)
    return {number: rng.integers(0, 2**64, size, dtype=np.uint64) for number in range(num_nodes)}


def plain_sum(vectors: Mapping[int, np.ndarray], nodes: Collection[int]) -> np.ndarray:
    """Return the sum modulo 2^64, by Python's whole numbers."""
    columns = zip(*(vectors[number].tolist() for number in nodes), strict=True)
    return np.array([sum(column) % 2**64 for column in columns], dtype=np.uint64)
