"""The side of a node: one function per step, from its state and a message to its next state and its answer.

A state is used once: the caller replaces it by the next one, and deletes it after step 5. A node therefore answers each
step once, signs one list of survivors, and never reveals both secrets of one peer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from copra_fl.secure_aggregation import shamir
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.secure_aggregation.keys import (
    agree,
    bind,
    derive,
    is_signed,
    new_secret,
    public_identity,
    public_of,
    seal,
    sign,
    unseal,
)
from copra_fl.secure_aggregation.masks import add_pairwise, mask
from copra_fl.secure_aggregation.messages import Confirmation, Keys, Revealed, SealedShares
from copra_fl.secure_aggregation.roster import (
    Roster,
    check_keys,
    check_list,
    commitment_to,
    signed_text,
    survivors_text,
)


@dataclass(frozen=True)
class Secrets:
    """The state of a node after step 1: what it must not lose and must not tell.

    Attributes:
        run, server_round, node: of the step, and the number of the node.
        mask_key, share_key: private X25519 keys.
        seed: self seed.
    """

    run: str
    server_round: int
    node: int
    mask_key: bytes = field(repr=False)
    share_key: bytes = field(repr=False)
    seed: bytes = field(repr=False)


@dataclass(frozen=True)
class Session:
    """The state of a node after step 2, and after it has received the others' shares.

    Attributes:
        secrets: of step 1.
        roster: the nodes of the round.
        shares: node -> the shares of its self seed and mask key that this node holds; at first only its own.
        masked: whether the vector has been sent.
        inputs: digest of what the node has computed its vector from.
        vector: digest of the vector.
        confirmed: whether a list of survivors has been signed.
    """

    secrets: Secrets
    roster: Roster
    shares: Mapping[int, tuple[bytes, bytes]] = field(repr=False)
    masked: bool = False
    inputs: bytes = b""
    vector: bytes = b""
    confirmed: bool = False


def offer_keys(run: str, server_round: int, node: int, identity: bytes) -> tuple[Secrets, Keys]:
    """Step 1: make the secrets of a round, and sign their public part with the node's private key `identity`."""
    secrets = Secrets(run, server_round, node, new_secret(), new_secret(), new_secret())
    commitment = commitment_to(secrets.seed, run, server_round, node)
    keys = Keys(node, public_of(secrets.mask_key), public_of(secrets.share_key), commitment, public_identity(identity))
    return secrets, replace(keys, signature=sign(identity, signed_text(run, server_round, keys)))


def share_secrets(
    secrets: Secrets, roster: Roster, trusted: Mapping[int, bytes] | None = None
) -> tuple[Session, list[SealedShares]]:
    """Step 2: check the list of nodes, and split both secrets for the neighbours.

    Raises SecureAggregationError for a list of another run or round, one without this node's own keys, a wrong
    signature, or a key that is not among the `trusted` ones (node -> public key; None: any).
    """
    if (roster.run, roster.server_round) != (secrets.run, secrets.server_round):
        raise SecureAggregationError(
            f"the list of nodes is of round {roster.server_round} of run {roster.run}, not of round "
            f"{secrets.server_round} of {secrets.run}"
        )
    check_list(roster)
    listed = roster.by_node.get(secrets.node)
    if listed is None or (listed.mask_key, listed.share_key) != (
        public_of(secrets.mask_key),
        public_of(secrets.share_key),
    ):
        raise SecureAggregationError(f"the list of nodes does not have the keys that node {secrets.node} has made")
    for keys in roster.keys:
        check_keys(roster.run, roster.server_round, keys, trusted)
    holders, threshold = roster.holders(secrets.node), roster.threshold(secrets.node)
    seeds = shamir.split(secrets.seed, holders, threshold)
    mask_keys = shamir.split(secrets.mask_key, holders, threshold)
    messages = []
    for holder in holders:
        sealed = b""
        if holder != secrets.node:
            key = agree(secrets.share_key, roster.by_node[holder].share_key, seal_info(roster, secrets.node, holder))
            sealed = seal(key, seeds[holder] + mask_keys[holder], roster.context)
        digests = digests_of(roster, secrets.node, holder, seeds[holder], mask_keys[holder])
        messages.append(SealedShares(secrets.node, holder, sealed, *digests))
    own = {secrets.node: (seeds[secrets.node], mask_keys[secrets.node])}
    return Session(secrets, roster, own), messages


def receive_shares(session: Session, sealed: Sequence[SealedShares]) -> Session:
    """Step 3, first half: open the neighbours' shares. Neighbours that have sent none have dropped out.

    Raises SecureAggregationError for a share that does not open, is not for this node or is not from a neighbour, for
    too few neighbours, and if the node has sent its vector already.
    """
    roster, node = session.roster, session.secrets.node
    refuse_second_vector(session)
    shares = dict(session.shares)
    for message in sealed:
        name = f"the shares that node {message.sender} has sent to node {node}"
        if message.receiver != node or message.sender not in roster.neighbours[node] or message.sender in shares:
            raise SecureAggregationError(f"{name} are not expected: addressed to another node, or sent twice")
        info = seal_info(roster, message.sender, node)
        key = agree(session.secrets.share_key, roster.by_node[message.sender].share_key, info)
        try:
            text = unseal(key, message.sealed, roster.context)
        except SecureAggregationError as error:
            raise SecureAggregationError(f"{name} do not open: {error}") from error
        seed, mask_key = text[: shamir.SHARE_BYTES], text[shamir.SHARE_BYTES :]
        if digests_of(roster, message.sender, node, seed, mask_key) != (message.seed_digest, message.key_digest):
            raise SecureAggregationError(f"{name} are not those that it has announced")
        shares[message.sender] = seed, mask_key
    if len(shares) < roster.threshold(node):
        raise SecureAggregationError(
            f"node {node} has shares of {len(shares)} nodes, its own among them; {roster.threshold(node)} are needed"
        )
    return replace(session, shares=shares)


def mask_vector(session: Session, vector: np.ndarray, inputs: bytes) -> tuple[Session, np.ndarray]:
    """Step 3, second half: return `vector` (size,) uint64 plus the self mask and the masks shared with neighbours.

    `inputs` is a digest of what the server has told the node to compute the vector from. Only nodes with equal inputs
    share a mask: otherwise a server could let the others compute vectors that it knows, and read this one in the sum.

    Raises SecureAggregationError for a second vector: the difference of two would show without masks.
    """
    refuse_second_vector(session)
    secrets, roster = session.secrets, session.roster
    masked = vector + mask(self_mask_key(roster, secrets.node, secrets.seed), len(vector))
    for other in session.shares.keys() - {secrets.node}:
        key = pairwise_key(roster, secrets.node, other, secrets.mask_key, inputs)
        add_pairwise(masked, key, secrets.node, other)
    return replace(session, masked=True, inputs=inputs, vector=vector_digest(vector)), masked


def vector_digest(vector: np.ndarray) -> bytes:
    """Return the digest by which a node recognizes a vector (size,) uint64."""
    return bind("vector", vector.tobytes())


def refuse_second_vector(session: Session) -> None:
    """Raise SecureAggregationError if the node has sent its vector: masks are used once."""
    if session.masked:
        raise SecureAggregationError(f"node {session.secrets.node} has sent its vector of this round already")


def confirm(session: Session, survivors: Iterable[int], identity: bytes) -> tuple[Session, Confirmation]:
    """Step 4: return the node's inputs and the signature of the list of survivors by its private key `identity`.

    Raises SecureAggregationError for a second list, and as `check_survivors` does.
    """
    alive = check_survivors(session, survivors)
    if session.confirmed:
        raise SecureAggregationError(
            f"node {session.secrets.node} has signed a list of survivors of this round already"
        )
    signature = sign(identity, survivors_text(session.roster, alive))
    return replace(session, confirmed=True), Confirmation(session.inputs, signature)


def reveal(session: Session, survivors: Iterable[int], signatures: Mapping[int, bytes]) -> Revealed:
    """Step 5: reveal shares of the self seed of every survivor, and of the mask key of every other node.

    Args:
        survivors: the list of survivors.
        signatures: survivor -> its signature of that list.

    Raises SecureAggregationError for too few signatures, for a wrong one, and as `check_survivors` does.
    """
    roster, node, alive = session.roster, session.secrets.node, check_survivors(session, survivors)
    if unknown := sorted(signatures.keys() - alive):
        raise SecureAggregationError(f"nodes {unknown} have signed the list of survivors, but are not on it")
    for signer, signature in sorted(signatures.items()):
        check_confirmation(roster, signer, signature, alive)
    if len(signatures) < roster.min_nodes:
        raise SecureAggregationError(
            f"{len(signatures)} of {len(roster.keys)} nodes have signed the list of survivors; below "
            f"{roster.min_nodes} node {node} reveals nothing"
        )
    return Revealed(
        node,
        {owner: seed for owner, (seed, _) in session.shares.items() if owner in alive},
        {owner: mask_key for owner, (_, mask_key) in session.shares.items() if owner not in alive},
    )


def check_confirmation(roster: Roster, node: int, signature: bytes, survivors: Iterable[int]) -> None:
    """Raise SecureAggregationError unless `signature` is that of the list of survivors by `node`."""
    if not is_signed(roster.by_node[node].identity, signature, survivors_text(roster, survivors)):
        raise SecureAggregationError(
            f"the list of survivors is not signed by node {node}: the server has told it another list, or its "
            "signature was changed"
        )


def check_survivors(session: Session, survivors: Iterable[int]) -> frozenset[int]:
    """Return the `survivors`.

    Raises SecureAggregationError before the node's own vector was sent, for a list of survivors without this node or
    with an unknown one, for a neighbour without shares here, whose mask the vector does not have, and for too few in
    all or among the neighbours: their sum would say too much of each.
    """
    roster, node, alive = session.roster, session.secrets.node, frozenset(survivors)
    if not session.masked or node not in alive:
        raise SecureAggregationError(f"node {node} is asked to reveal shares, but has not sent a vector to this sum")
    if unknown := sorted(alive - roster.by_node.keys()):
        raise SecureAggregationError(f"the survivors {unknown} are not in the list of nodes")
    if apart := sorted(alive.intersection(roster.neighbours[node]) - session.shares.keys()):
        raise SecureAggregationError(
            f"the survivors {apart} share no mask with node {node}: the server has not passed on their shares"
        )
    if len(alive) < roster.min_nodes:
        raise SecureAggregationError(
            f"{len(alive)} of {len(roster.keys)} nodes are listed as survivors; below {roster.min_nodes} node {node} "
            "reveals nothing"
        )
    if (near := len(alive.intersection(roster.holders(node)))) < roster.threshold(node):
        raise SecureAggregationError(
            f"{near} of the neighbours of node {node} are listed as survivors, itself among them; below "
            f"{roster.threshold(node)} it reveals nothing"
        )
    return alive


def seal_info(roster: Roster, sender: int, receiver: int) -> bytes:
    """Return the purpose of the key that seals shares from `sender` to `receiver`."""
    return bind("seal", roster.context, sender, receiver)


def pairwise_key(roster: Roster, node: int, other: int, private: bytes, inputs: bytes) -> bytes:
    """Return the key of the mask that two nodes with the same `inputs` share, from the private mask key of `node`."""
    info = bind("mask", roster.context, inputs, min(node, other), max(node, other))
    return agree(private, roster.by_node[other].mask_key, info)


def self_mask_key(roster: Roster, node: int, seed: bytes) -> bytes:
    """Return the key of a node's self mask."""
    return derive(seed, bind("self mask", roster.context, node))


def digests_of(roster: Roster, owner: int, holder: int, seed: bytes, mask_key: bytes) -> tuple[bytes, bytes]:
    """Return the digests of one holder's shares of the self seed and of the mask key."""
    return tuple(  # type: ignore[return-value]
        bind("share", kind, roster.context, owner, holder, share) for kind, share in (("seed", seed), ("key", mask_key))
    )
