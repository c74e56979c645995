"""Real vectors as whole numbers modulo 2^64, so that masks hide them completely and sums are exact.

    q = round(s x) mod 2^64,    sum x ~ signed(sum q mod 2^64) / s,    s a power of two

Each of n nodes may use 1/n of the range, which `encode` checks: nothing is cut, and the sum cannot wrap around. Each
node rounds by at most half a unit, so the sum of n vectors is off by at most n / (2 s) in every value.
"""

from __future__ import annotations

import math

import numpy as np

from copra_fl.secure_aggregation.errors import SecureAggregationError

#: largest whole number of the range from -2^63 to 2^63 - 1
LARGEST = 2**63 - 1


def scale_for(bound: float, num_nodes: int) -> float:
    """Return s, the largest power of two with which values up to `bound` of each of `num_nodes` nodes fit.

    Raises SecureAggregationError for a bound that is not above 0 and finite.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise SecureAggregationError(f"the bound of the values is {bound}; it must be above 0 and finite")
    return 2.0 ** math.floor(math.log2(LARGEST // num_nodes) - math.log2(bound) - 1e-9)


def encode(values: np.ndarray, scale: float, num_nodes: int) -> np.ndarray:
    """Return (size,) uint64: `values` (size,) float64 times `scale`, rounded.

    Raises SecureAggregationError if a value is not finite or larger than 1 / `num_nodes` of the range. The message does
    not tell the value: it leaves the node.
    """
    with np.errstate(over="ignore"):
        scaled = np.rint(np.asarray(values, dtype=np.float64) * scale)
    largest = float(np.abs(scaled).max(initial=0.0))
    if not largest <= LARGEST // num_nodes:  # also if it is NaN
        raise SecureAggregationError(
            f"a value does not fit: with {num_nodes} nodes and a scale of {scale:g} the largest is "
            f"{LARGEST // num_nodes / scale:.4g}"
        )
    return scaled.astype(np.int64).view(np.uint64)


def decode(total: np.ndarray, scale: float) -> np.ndarray:
    """Return (size,) float64: the sum of vectors whose codes (size,) uint64 have the sum `total`."""
    return total.view(np.int64).astype(np.float64) / scale


def largest_error(scale: float, num_nodes: int) -> float:
    """Return the largest error of a value of the sum of `num_nodes` vectors by rounding."""
    return num_nodes / (2 * scale)
