"""Shapley values: the contribution of each player to the value of the grand coalition.

    phi_i = mean over all orders of v(players up to i) - v(players before i)
          = integral_0^1 E[ v(R + i) - v(R) ] dp,    R: each other player is a member with probability p

Exact by enumeration for few players, otherwise estimated from permutations in antithetic pairs, an order and its
reverse (Mitchell et al., arXiv 2104.12199); the common estimator of the integral (Owen sampling) is biased. The
contributions within an order sum to v(all) - v(none), and so do the values, exact or estimated (efficiency).

Here the players are the layers or modules of an adapter, and v is accuracy or minus loss with all other players
switched off. CoTo (arXiv 2506.05713) reports that its training spreads the values more evenly over the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: v of many coalitions at once: (n, players) bool, True for members, to (n,) values
CharacteristicFunction = Callable[[np.ndarray], Floats]

#: up to this many players all coalitions are evaluated
MAX_EXACT = 10
#: pairs of orders that are drawn between two looks at the standard errors
PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class ShapleyValues:
    """The Shapley values of a game.

    Attributes:
        values: (players,) phi.
        errors: (players,) standard errors of the sampling of orders; 0 for exact values.
        empty: v of the empty coalition.
        grand: v of the grand coalition, all players.
        orders: (pairs, players) sampled orders, each used with its reverse; no rows for exact values.
    """

    values: Floats
    errors: Floats
    empty: float
    grand: float
    orders: np.ndarray

    @property
    def efficiency_error(self) -> float:
        """sum phi - (v(all) - v(none)): the rounding error."""
        return float(self.values.sum() - (self.grand - self.empty))


def exact(value: CharacteristicFunction, players: int) -> ShapleyValues:
    """Evaluate all 2^players coalitions: phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S))."""
    codes = np.arange(2**players)
    is_member = (codes[:, None] >> np.arange(players)) % 2 == 1
    values = np.asarray(value(is_member), dtype=np.float64)
    size = is_member.sum(1)
    weight = np.array([1 / (players * math.comb(players - 1, k)) for k in range(players)])
    phi = np.zeros(players)
    for player in range(players):
        without = codes[~is_member[:, player]]
        phi[player] = weight[size[without]] @ (values[without | 1 << player] - values[without])
    no_orders = np.zeros((0, players), dtype=int)
    return ShapleyValues(phi, np.zeros(players), float(values[0]), float(values[-1]), no_orders)


def from_orders(value: CharacteristicFunction, orders: np.ndarray) -> ShapleyValues:
    """Estimate the values from (pairs, players) orders and their reverses; errors are those of the mean over pairs."""
    contributions, empty, grand = _contributions(value, orders)
    return _estimate(contributions, orders, empty, grand)


def sample(
    value: CharacteristicFunction,
    players: int,
    stream: np.random.Generator,
    standard_error: float,
    max_pairs: int = 512,
) -> ShapleyValues:
    """Draw orders from `stream` until all errors are at most `standard_error` or `max_pairs` pairs are drawn."""
    contributions, orders = np.zeros((0, players)), np.zeros((0, players), dtype=int)
    while True:
        num_new = min(PAIRS_AT_ONCE, max_pairs - len(orders))
        new_orders = stream.permuted(np.tile(np.arange(players), (num_new, 1)), axis=1)
        new_contributions, empty, grand = _contributions(value, new_orders)
        contributions = np.concatenate([contributions, new_contributions])
        orders = np.concatenate([orders, new_orders])
        estimate = _estimate(contributions, orders, empty, grand)
        if estimate.errors.max() <= standard_error or len(orders) >= max_pairs:
            return estimate


def top_third(values: Floats) -> float:
    """Return the share of sum |phi| held by the third of the players (rounded up) with the largest |phi|.

    >>> top_third(np.array([3.0, 1.0, -1.0]))
    0.6
    """
    size, count = np.sort(np.abs(values))[::-1], math.ceil(len(values) / 3)
    return float(size[:count].sum() / size.sum()) if size.any() else count / len(values)


def gini(values: Floats) -> float:
    """Return the Gini coefficient of |phi|: mean difference of two players over twice the mean; 0 for equal values."""
    size = np.abs(values)
    return float(np.abs(size[:, None] - size).mean() / (2 * size.mean())) if size.any() else 0.0


def _contributions(value: CharacteristicFunction, orders: np.ndarray) -> tuple[Floats, float, float]:
    """Return (pairs, players) contributions, each the mean over an order and its reverse, with v(none) and v(all)."""
    pairs, players = orders.shape
    both = np.stack([orders, orders[:, ::-1]], axis=1)
    # place[..., i]: number of players before player i; coalition k of an order has the players with place < k
    place = np.argsort(both, axis=2)
    coalitions = place[:, :, None, :] < np.arange(players + 1)[:, None]
    distinct, where = np.unique(coalitions.reshape(-1, players), axis=0, return_inverse=True)
    values = np.asarray(value(distinct), dtype=np.float64)[where.reshape(coalitions.shape[:3])]
    added = np.take_along_axis(np.diff(values, axis=2), place, axis=2)
    return added.mean(axis=1), float(values[0, 0, 0]), float(values[0, 0, -1])


def _estimate(contributions: Floats, orders: np.ndarray, empty: float, grand: float) -> ShapleyValues:
    pairs = len(contributions)
    spread = contributions.std(axis=0, ddof=1) if pairs > 1 else np.full(contributions.shape[1], np.inf)
    return ShapleyValues(contributions.mean(axis=0), spread / math.sqrt(pairs), empty, grand, orders)
