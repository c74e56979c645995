"""The graph of neighbours: who shares masks with whom, and how many shares rebuild a secret.

Below 16 nodes everybody is everybody's neighbour. From there on the graph is that of SecAgg+ (Bell et al., CCS 2020):
nodes lie on a ring in a random order, and each has the k / 2 nearest on both sides as neighbours. A node's secrets
have k + 1 holders, its neighbours and itself, and t = share (k + 1) shares rebuild one.

`degree` is the smallest k for which the server cannot separate a node from all of its neighbours by naming different
survivors to different nodes (`_can_isolate`), and for which these have a chance below 2^-40, if at most 1/5 of the
nodes work together with the server and as many drop out:

- a node has 2 t - (k + 1) or more neighbours that work with the server. With so many, a server that claims to one half
  of the neighbours that a node has dropped out, and to the other half that it has not, gets t shares of both secrets
- the ring without those nodes falls apart: two stretches of k / 2 neighbours are gone, and the server learns the sum
  of each side
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil, comb

#: smallest number of nodes with a sparse graph
SPARSE_FROM = 16
#: largest share of the nodes that work with the server, and of those that drop out
CORRUPT = DROPPED = Fraction(1, 5)
#: largest chance that one of the two happens
CHANCE = Fraction(1, 2**40)


def threshold_of(share: float, number: int) -> int:
    """Return `share` of `number`, rounded up; at least 2."""
    return max(2, ceil(share * number - 1e-9))


@lru_cache
def degree(num_nodes: int, share: float) -> int:
    """Return k, the number of neighbours of each node."""
    if num_nodes < SPARSE_FROM:
        return num_nodes - 1
    for k in range(2, num_nodes - 1, 2):
        if _can_isolate(num_nodes, k, share):
            continue
        if _chance_of_both(num_nodes, k, share) + _chance_of_parting(num_nodes, k) < CHANCE:
            return k
    return num_nodes - 1


def neighbours(ring: Sequence[int], k: int) -> dict[int, tuple[int, ...]]:
    """Return node -> its k neighbours on the `ring`, sorted."""
    number = len(ring)
    steps = range(1, number) if k == number - 1 else [s for d in range(1, k // 2 + 1) for s in (d, -d)]
    return {node: tuple(sorted(ring[(place + step) % number] for step in steps)) for place, node in enumerate(ring)}


def _can_isolate(num_nodes: int, k: int, share: float) -> bool:
    """Return whether the server can get the mask keys of all honest neighbours of a node that has sent its vector.

    If c nodes work with the server, all of them neighbours, each of the k - c other keys needs t - c shares of honest
    nodes; an honest node reveals at most k + 1 - t mask keys.
    """
    corrupt, threshold = int(num_nodes * CORRUPT), threshold_of(share, k + 1)
    needed = max(0, k - corrupt) * max(0, threshold - corrupt)
    return needed <= (num_nodes - corrupt) * (k + 1 - threshold)


def _chance_of_both(num_nodes: int, k: int, share: float) -> Fraction:
    """Return a bound on the chance that some node has 2 t - (k + 1) corrupt neighbours: hypergeometric, n times."""
    corrupt, others = int(num_nodes * CORRUPT), num_nodes - 1
    enough = max(0, 2 * threshold_of(share, k + 1) - (k + 1))
    ways = sum(comb(corrupt, c) * comb(others - corrupt, k - c) for c in range(enough, min(k, corrupt) + 1))
    return Fraction(num_nodes * ways, comb(others, k))


def _chance_of_parting(num_nodes: int, k: int) -> Fraction:
    """Return a bound on the chance that two stretches of k / 2 nodes are all corrupt or dropped: C(n, 2) places."""
    gone = int(num_nodes * CORRUPT) + int(num_nodes * DROPPED)
    if gone < k:
        return Fraction(0)
    return Fraction(comb(num_nodes, 2) * comb(num_nodes - k, gone - k), comb(num_nodes, gone))
