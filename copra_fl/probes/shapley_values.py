"""Shapley values: how much each player adds to what all of them reach together.

    phi_i = integral_0^1 E[ v(R + i) - v(R) ] dp,    R: each other player in with probability p
          = mean over all orders of v(those up to i) - v(those before i)

Exact by enumeration where players are few, else by permutations in antithetic pairs, an order and its reverse
(Mitchell et al., arXiv 2104.12199); the usual estimator of the integral (Owen sampling) is biased. Each order's
contributions add up to v(all) - v(none), and so do the values, exact or estimated.

Here players are the layers or modules of an adapter, v is accuracy or minus loss with the adapters of the others off;
CoTo (arXiv 2506.05713) reports that its training spreads the values over layers more evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: (n, players) bool, who is in, to (n,) values: many coalitions at once
Value = Callable[[np.ndarray], Floats]

#: up to so many players all coalitions are evaluated
MAX_EXACT = 10
#: pairs of orders drawn before a standard error is believed, and at a time after that
PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class Shapley:
    """
    Attributes:
        values: (players,) phi.
        errors: (players,) standard errors of the sampling of orders; 0 where all coalitions were evaluated.
        nothing: v(none).
        everything: v(all).
        orders: (pairs, players) orders that were sampled, each with its reverse; none where values are exact.
    """

    values: Floats
    errors: Floats
    nothing: float
    everything: float
    orders: np.ndarray

    @property
    def efficiency_error(self) -> float:
        """sum phi - (v(all) - v(none)): nothing but rounding."""
        return float(self.values.sum() - (self.everything - self.nothing))


def exact(value: Value, players: int) -> Shapley:
    """By all 2^players coalitions: phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))."""
    codes = np.arange(2**players)
    member = (codes[:, None] >> np.arange(players)) % 2 == 1
    values = np.asarray(value(member), dtype=np.float64)
    size = member.sum(1)
    share = np.array([1 / (players * math.comb(players - 1, k)) for k in range(players)])
    phi = np.zeros(players)
    for player in range(players):
        without = codes[~member[:, player]]
        phi[player] = share[size[without]] @ (values[without | 1 << player] - values[without])
    none = np.zeros((0, players), dtype=int)
    return Shapley(phi, np.zeros(players), float(values[0]), float(values[-1]), none)


def from_orders(value: Value, orders: np.ndarray) -> Shapley:
    """The estimate of these (pairs, players) orders and their reverses; errors are those of the mean over pairs."""
    contributions, nothing, everything = _contributions(value, orders)
    return _estimate(contributions, orders, nothing, everything)


def sample(
    value: Value, players: int, stream: np.random.Generator, standard_error: float, max_pairs: int = 512
) -> Shapley:
    """Orders from `stream` until every value's standard error is at most `standard_error`, or `max_pairs` are drawn."""
    contributions, orders = np.zeros((0, players)), np.zeros((0, players), dtype=int)
    while True:
        fresh = stream.permuted(np.tile(np.arange(players), (min(PAIRS_AT_ONCE, max_pairs - len(orders)), 1)), axis=1)
        found, nothing, everything = _contributions(value, fresh)
        contributions, orders = np.concatenate([contributions, found]), np.concatenate([orders, fresh])
        estimate = _estimate(contributions, orders, nothing, everything)
        if estimate.errors.max() <= standard_error or len(orders) >= max_pairs:
            return estimate


def top_third(values: Floats) -> float:
    """The share of sum |phi| that the third (rounded up) of the players with the largest |phi| has.

    >>> top_third(np.array([3.0, 1.0, -1.0]))
    0.6
    """
    size, count = np.sort(np.abs(values))[::-1], math.ceil(len(values) / 3)
    return float(size[:count].sum() / size.sum()) if size.any() else count / len(values)


def gini(values: Floats) -> float:
    """Gini coefficient of |phi|: mean difference between two players over twice the mean; 0 where all are alike."""
    size = np.abs(values)
    return float(np.abs(size[:, None] - size).mean() / (2 * size.mean())) if size.any() else 0.0


def _contributions(value: Value, orders: np.ndarray) -> tuple[Floats, float, float]:
    """(pairs, players) mean of what a player adds in an order and in its reverse; v(none), v(all)."""
    pairs, players = orders.shape
    both = np.stack([orders, orders[:, ::-1]], axis=1)
    # place[..., i]: how many come before player i; in coalition k of an order are those with place < k
    place = np.argsort(both, axis=2)
    coalitions = place[:, :, None, :] < np.arange(players + 1)[:, None]
    distinct, where = np.unique(coalitions.reshape(-1, players), axis=0, return_inverse=True)
    values = np.asarray(value(distinct), dtype=np.float64)[where.reshape(coalitions.shape[:3])]
    added = np.take_along_axis(np.diff(values, axis=2), place, axis=2)
    return added.mean(axis=1), float(values[0, 0, 0]), float(values[0, 0, -1])


def _estimate(contributions: Floats, orders: np.ndarray, nothing: float, everything: float) -> Shapley:
    pairs = len(contributions)
    spread = contributions.std(axis=0, ddof=1) if pairs > 1 else np.full(contributions.shape[1], np.inf)
    return Shapley(contributions.mean(axis=0), spread / math.sqrt(pairs), nothing, everything, orders)
