"""The keys of the registered nodes, by which the API gate admits requests before it reads them.

A node signs the time of each request. Flower checks key, signature and time, but only after it has read the body. The
names of the headers and the format of the key are Flower 1.42's.
"""

from __future__ import annotations

import binascii
import logging
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from copra_fl.deployment import clocks
from copra_fl.deployment.api_gate import Refusal

log = logging.getLogger(__name__)

PUBLIC_KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"


class NodeKeys:
    """The registered nodes. Until the first `replace`, every request gets status 503, after which a node tries again.

    A node that connected before its key was registered would give up.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, tuple[str, EllipticCurvePublicKey]] | None = None

    def replace(self, keys: Mapping[str, str]) -> None:
        """Admit the nodes with `keys` from now on, and no others: name -> public key as in a .pub file."""
        nodes = {}
        for name, text in keys.items():
            key = load_ssh_public_key(text.encode())
            assert isinstance(key, EllipticCurvePublicKey), "Flower registers no other keys"
            nodes[b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))] = name, key
        self._nodes = nodes

    def admit(self, headers: Mapping[bytes, bytes]) -> Refusal | None:
        """Return why a request with these headers is rejected; None if a registered node has signed it just now."""
        if self._nodes is None:
            return Refusal(503, "the nodes' keys are being registered, try again")
        if (node := self._nodes.get(headers.get(PUBLIC_KEY, b""))) is None:
            return Refusal(401, "this node's key is not registered")
        name, key = node
        try:
            timestamp = headers.get(TIMESTAMP, b"")
            key.verify(b64decode(headers.get(SIGNATURE, b""), validate=True), timestamp, ECDSA(SHA256()))
            seconds_ahead = (datetime.fromisoformat(timestamp.decode("ascii")) - datetime.now(UTC)).total_seconds()
        except (InvalidSignature, UnsupportedAlgorithm, binascii.Error, ValueError, TypeError):
            return Refusal(401, "the signature is not that of the node's key")
        if not -clocks.MAX_BEHIND < seconds_ahead < clocks.MAX_AHEAD:
            log.warning("%s is rejected: its %s", name, clocks.describe(seconds_ahead))
            return Refusal(401, f"the {clocks.describe(seconds_ahead)}")
        return None
