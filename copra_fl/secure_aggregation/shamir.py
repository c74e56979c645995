"""Shamir's secret sharing (Communications of the ACM 22, 1979) of 32 bytes, in the integers modulo a prime above 2^256.

    f(x) = secret + c_1 x + ... + c_(t-1) x^(t-1),    the share of holder i is f(i + 1)

Any t shares give f(0), by Lagrange's formula; t - 1 say nothing about it.

pycryptodome's `Shamir` is sound but too slow here: it inverts elements of GF(2^128) one by one, 0.8 s for one secret of
16 bytes from 52 shares, so a round of 128 nodes would take minutes. `flwr.common.secure_aggregation.crypto.shamir`
calls it once for every 16 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

#: the smallest prime above 2^256
PRIME = 2**256 + 297
#: bytes of a secret and of a share
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """Return holder -> its share of `secret` (32 bytes); `threshold` shares rebuild it. Holders count from 0."""
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {holder: _value(coefficients, holder + 1).to_bytes(SHARE_BYTES, "big") for holder in holders}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret in holder -> share, which must be at least `threshold` shares of it.

    Raises ValueError for shares that are not of one secret of 32 bytes; most wrong shares give a wrong secret.
    """
    total = 0
    for holder, share in shares.items():
        numerator, denominator = 1, 1
        for other in shares.keys() - {holder}:
            numerator = numerator * (other + 1) % PRIME
            denominator = denominator * (other - holder) % PRIME
        total += int.from_bytes(share, "big") * numerator * pow(denominator, -1, PRIME)
    secret = total % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("the shares are not of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: list[int], x: int) -> int:
    """Return sum_i coefficients_i x^i modulo the prime, by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
