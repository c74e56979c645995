"""The messages of a round, as plain data. `copra_fl.secure_wire` packs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Keys:
    """Step 1, from a node to the server and from there to all nodes.

    Attributes:
        node: number of the node (its partition-id).
        mask_key: public X25519 key for the masks.
        share_key: public X25519 key, to seal shares for the node.
        commitment: SHA-256 of the self seed, bound to run, round and node.
        identity: the node's own public key, in OpenSSH's format.
        signature: of everything above with run and round, by that key.
    """

    node: int
    mask_key: bytes
    share_key: bytes
    commitment: bytes
    identity: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class Confirmation:
    """Step 4, from a node to the server.

    Attributes:
        inputs: digest of what the node has computed its vector from.
        signature: of the list of survivors, by the node's own key.
    """

    inputs: bytes
    signature: bytes


@dataclass(frozen=True)
class SealedShares:
    """Step 2, from one node to another through the server.

    Attributes:
        sender, receiver: numbers of the nodes; a node keeps the shares of its own secrets and sends their digests.
        sealed: the share of the self seed and that of the mask key, encrypted; empty for the sender itself.
        seed_digest, key_digest: SHA-256 of the two, so that the server can tell who reveals a wrong share.
    """

    sender: int
    receiver: int
    sealed: bytes
    seed_digest: bytes
    key_digest: bytes


@dataclass(frozen=True)
class Revealed:
    """Step 5, from a node to the server.

    Attributes:
        node: number of the node.
        seeds: node that has sent its vector -> share of its self seed.
        keys: node that has dropped out -> share of its mask key.
    """

    node: int
    seeds: Mapping[int, bytes] = field(default_factory=dict)
    keys: Mapping[int, bytes] = field(default_factory=dict)
