"""Random numbers of differential privacy, from the operating system's cryptographic generator.

The noise of a private run must not be found by search. Generators of torch and NumPy start from seeds that can be tried
one by one: torch's uses 32 bits of its seed. Numbers from here are never stored and cannot be drawn again.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

#: number of bytes -> as many random bytes
RandomBytes = Callable[[int], bytes]


def uniforms(count: int, random_bytes: RandomBytes = os.urandom) -> np.ndarray:
    """Return `count` numbers k / 2^53, each k from 1 to 2^53 equally likely."""
    words = np.frombuffer(random_bytes(8 * count), dtype=np.uint64)
    return ((words >> np.uint64(11)) + 1.0) * 2.0**-53


def normals(count: int, random_bytes: RandomBytes = os.urandom) -> np.ndarray:
    """Return `count` standard normal numbers, by Box and Muller (1958). None is beyond 8.6, which has odds of 1e-17."""
    radius, angle = uniforms(2 * count, random_bytes).reshape(2, count)
    return np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
