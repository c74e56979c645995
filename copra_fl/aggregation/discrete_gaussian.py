"""Noise on whole numbers: the discrete Gaussian N_Z(0, s^2) (Canonne, Kamath and Steinke, arXiv 2004.00010).

    P(Y = k) ~ exp(-k^2 / (2 s^2)),    k whole

Nodes of secure aggregation each add a share of the noise, so noise must be whole numbers whose sums are known. Rounded
floating-point Gaussians are not: neither is their sum the rounded sum, nor do 53 bits draw them closely enough for
vectors of 10^5 values. `discrete_gaussian` draws

    Y = X_0 + 16 X_1 + ... + 16^5 X_5,    X_j from N_Z(0, 32^2),    s = 32 sqrt(1 + 16^2 + ... + 16^10) = 3.4e7

and X_j by a table of P(X <= k) in multiples of 2^-64, from the operating system's generator. Four steps separate the
sum of the noise of m nodes from the Gaussian mechanism of the accountant. Each changes a probability by a factor
exp(+-t) at most, or moves a share b of it, for a vector of d values:

    Y is N_Z(0, s^2)                 t = d 2^-100    Completing the square, P(Y = k) is exp(-k^2 / (2 s^2)) times a sum
                                                     exp(-(x - c)^2 / (2 w^2)) over whole x, with w^2 > 3.98. By
                                                     Poisson's summation formula it depends on c by a factor
                                                     1 +- 4 exp(-2 pi^2 w^2) only
    tables are rounded               b = d 2^-54     each of the 6 tables moves less than 2^-57 (a test has the number)
    the sum of m such is             t = d 2^-100    the same, with w^2 >= s^2 / 2 (Kairouz et al., arXiv 2102.06387,
    N_Z(0, m s^2)                                    section 3)
    N_Z(0, v) is N(0, v), rounded    t = d 2^-45     their quotient is between exp(-1 / (8 v)) and cosh(k / (2 v)), so
    (v >= s^2)                                       up to 12 sqrt(v) within 1 +- 2^-45; beyond lie d 4e-33

Clients' changes are whole numbers, so rounding the sum with Gaussian noise is a step behind the Gaussian mechanism that
can only hide. With d values and m nodes in T rounds, epsilon is therefore larger by at most 2 T d 2^-45, and delta by
about (1 + exp(epsilon)) T m d 2^-54: for 10^5 values, 10 nodes and 100 rounds 6e-7 and, with epsilon = 3, 2e-7.
"""

from __future__ import annotations

import math
import os
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate

import numpy as np

from copra_fl.aggregation.secret_random import RandomBytes

#: standard deviation of a base number, and its largest value
BASE, TAIL = 32, 9 * 32
#: factors of the base numbers in a sum
FACTORS = np.array([16**place for place in range(6)])
#: standard deviation and largest value of the noise
DEVIATION = BASE * math.sqrt(sum(int(factor) ** 2 for factor in FACTORS))
LARGEST_NOISE = TAIL * int(FACTORS.sum())


def discrete_gaussian(count: int, random_bytes: RandomBytes = os.urandom) -> np.ndarray:
    """Return (count,) int64: whole numbers of N_Z(0, DEVIATION^2), none beyond +-LARGEST_NOISE."""
    words = np.frombuffer(random_bytes(8 * len(FACTORS) * count), dtype="<u8")
    base = np.searchsorted(thresholds(), words, side="right") - TAIL
    return FACTORS @ base.reshape(len(FACTORS), count)


@lru_cache
def thresholds() -> np.ndarray:
    """Return (2 TAIL,) uint64: the entry with index i is 2^64 P(X <= i - TAIL) of a base number X, rounded."""
    with localcontext(prec=50):
        weights = [(-Decimal(k * k) / (2 * BASE**2)).exp() for k in range(-TAIL, TAIL + 1)]
        unit = 2**64 / sum(weights, Decimal(0))
        return np.array([round(unit * total) for total in accumulate(weights[:-1])], dtype=np.uint64)
