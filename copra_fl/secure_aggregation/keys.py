"""Keys of a round, made with the package `cryptography`: agreement, encryption and signatures.

agreement     X25519 (RFC 7748), then HKDF-SHA256 (RFC 5869) with the purpose and both nodes in its info
encryption    ChaCha20-Poly1305 (RFC 8439) under a key that is used once
signature     ECDSA on NIST P-384 with SHA-384, by the key in the node config's node-key
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from copra_fl.secure_aggregation.errors import SecureAggregationError

#: bytes of keys and seeds
KEY_BYTES = 32
#: first part of everything that is hashed or signed
DOMAIN = "copra-fl secure aggregation 1"
#: a key is used for one text only, so the nonce may be the same
NONCE = bytes(12)


def bind(*parts: str | int | bytes) -> bytes:
    """Return the SHA-256 of `parts`, each with its length before it, so that no two lists have the same text."""
    digest = hashlib.sha256()
    for part in (DOMAIN, *parts):
        text = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.digest()


def new_secret() -> bytes:
    """Return 32 random bytes: a private X25519 key, or a seed."""
    return os.urandom(KEY_BYTES)


def public_of(private: bytes) -> bytes:
    """Return the public X25519 key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, info: bytes) -> bytes:
    """Return the key that both owners of the pair of keys derive, for one purpose `info`.

    Raises SecureAggregationError for a public key of small order, with which everybody would derive the same.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureAggregationError("a public key is not a valid X25519 key") from error
    return derive(secret, info)


def derive(secret: bytes, info: bytes) -> bytes:
    """Return a key of 32 bytes from `secret` for one purpose `info`."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def seal(key: bytes, text: bytes, context: bytes) -> bytes:
    """Encrypt `text` and authenticate it together with `context`; `key` must not be used again."""
    return ChaCha20Poly1305(key).encrypt(NONCE, text, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """Return the text that `seal` encrypted. Raises SecureAggregationError if key, text or context differ."""
    try:
        return ChaCha20Poly1305(key).decrypt(NONCE, sealed, context)
    except InvalidTag as error:
        raise SecureAggregationError("it was changed, or made for another run, round or list of nodes") from error


def new_identity() -> bytes:
    """Return a new private key of a node in OpenSSH's format, as `ssh-keygen -t ecdsa -b 384` makes it."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def public_identity(private: bytes) -> bytes:
    """Return the public key of a node's private key, both in OpenSSH's format; without a comment."""
    public = serialization.load_ssh_private_key(private, password=None).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def normal_identity(public: bytes) -> bytes:
    """Return a node's public key in OpenSSH's format without the comment that a file may have."""
    openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return serialization.load_ssh_public_key(public).public_bytes(*openssh)


def sign(private: bytes, text: bytes) -> bytes:
    """Sign `text` with a node's private key in OpenSSH's format."""
    key = serialization.load_ssh_private_key(private, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(text, ec.ECDSA(hashes.SHA384()))


def is_signed(identity: bytes, signature: bytes, text: bytes) -> bool:
    """Return whether `signature` is that of `text` by the node with the public key `identity`."""
    try:
        key = serialization.load_ssh_public_key(identity)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, text, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True
