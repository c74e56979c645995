"""Masks: the keystream of ChaCha20 (RFC 8439) as whole numbers modulo 2^64.

Flower's `pseudo_rand_gen` folds a seed of 32 bytes to 32 bits and starts NumPy's Mersenne Twister with it: 2^32 tries
open every such mask.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

#: block counter and nonce: a key has one stream
START = bytes(16)


def mask(key: bytes, size: int) -> np.ndarray:
    """Return (size,) uint64 of the stream of `key` (32 bytes), each value equally likely."""
    stream = Cipher(algorithms.ChaCha20(key, START), mode=None).encryptor().update(bytes(8 * size))
    return np.frombuffer(stream, dtype="<u8")


def add_pairwise(vector: np.ndarray, key: bytes, node: int, other: int) -> None:
    """Add to `vector`, in place, the mask that `node` shares with `other`; the vector of `other` gets its negative."""
    if node < other:
        vector += mask(key, len(vector))
    else:
        vector -= mask(key, len(vector))
