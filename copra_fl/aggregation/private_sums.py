"""Differential privacy with secure aggregation: each node adds a share of the noise, so nobody sees a sum without it.

    vector of a node    ( K,   sum_k trunc(u clip(theta_k - theta_0)) + Y )    K: number of its clients
    sum of m nodes      ( sum K,   u (sum_k clipped changes + noise) )         variance of the noise: m (z C)^2 / h

Secure aggregation gives the sum of at least t nodes or no sum (t = secure-threshold of the round's nodes), and c nodes
(dp-colluding-nodes) may reveal their share of the noise or leave it out: to the server, or, because each node knows its
own share, to themselves. The shares of the other h = t - c nodes are enough, each with the variance (z C)^2 / h. From
c = 2 t - n on a lying server could find single vectors (`Roster.num_honest`); then h = 1. If all n nodes stay, the
variance is n / h times (z C)^2: with 10 nodes, secure-threshold = 2/3 and c = 1 it is 10 / 6, and the deviation 1.29
times as large. With c = 0 and secure-threshold = 1 there is no excess.

The unit 1 / u is such that a share is discrete Gaussian noise of deviation `discrete_gaussian.DEVIATION` units; there
is also the distribution of its sum. A client's clipped change is rounded towards zero, so that it gets no longer; that
costs less than a 3e7-th of a share's deviation in each value. Every value that travels gets noise.

A node computes u from the configuration and from the list of nodes that it has checked. All nodes take part in each
round, also those without a client in it: neither the variance nor the list shows who was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, Layout, Update
from copra_fl.aggregation.discrete_gaussian import DEVIATION, LARGEST_NOISE, discrete_gaussian
from copra_fl.aggregation.private import clip
from copra_fl.config import PrivacyConfig
from copra_fl.secure_aggregation import fixed_point
from copra_fl.secure_aggregation.errors import SecureAggregationError


def private_scale(privacy: PrivacyConfig, num_honest: int) -> float:
    """Return u, the units in 1.0, if the shares of `num_honest` nodes (h) must be enough."""
    return DEVIATION * math.sqrt(num_honest) / (privacy.dp_noise_multiplier * privacy.dp_clip)


def noise_multiplier(privacy: PrivacyConfig, num_honest: int, num_nodes: int) -> float:
    """Return the noise multiplier of the sum of `num_nodes` nodes (m), if `num_honest` (h) would be enough."""
    return privacy.dp_noise_multiplier * math.sqrt(num_nodes / num_honest)


def private_vector(
    start: Adapter,
    updates: Sequence[Update],
    clip_norm: float,
    scale: float,
    num_nodes: int,
    noise: Callable[[int], np.ndarray] = discrete_gaussian,
) -> np.ndarray:
    """Return the vector of a node, (1 + values,) uint64.

    Args:
        start: the tensors that clients train and send, before their training.
        updates: of the node's clients; a tensor that a client has not trained counts as unchanged.
        clip_norm: C.
        scale: u.
        num_nodes: number of nodes whose vectors are added.
        noise: number of values -> whole numbers of `discrete_gaussian`.

    Raises SecureAggregationError if the numbers could be larger than 1 / `num_nodes` of the range, and for two updates
    of one client, which could move the sum by 2 C.
    """
    if len({update.client for update in updates}) < len(updates):
        raise SecureAggregationError("a client is in the round twice, so its changes could be longer than dp-clip")
    if not len(updates) * clip_norm * scale + LARGEST_NOISE <= fixed_point.LARGEST // num_nodes:  # also if it is NaN
        raise SecureAggregationError(
            "dp-noise-multiplier is so small that dp-clip does not fit into 64 bits; set dp-noise-multiplier = 0.001 "
            "or more"
        )
    layout = Layout.by_name(start)
    total = noise(layout.size)
    for update in updates:
        change = {name: update.adapter.get(name, old).double() - old.double() for name, old in start.items()}
        total = total + (scale * layout.flatten(clip(change, clip_norm))).to(torch.int64).numpy()  # towards zero
    return np.concatenate([[len(updates)], total]).view(np.uint64)


def private_sum(total: np.ndarray, start: Adapter, num_clients: int, scale: float) -> Adapter:
    """Return the noisy sum of the clients' changes, in float64, from the sum of the nodes' vectors.

    Raises SecureAggregationError if it is not of `num_clients` clients.
    """
    if int(total[0]) != num_clients:
        raise SecureAggregationError(
            f"the sum of the nodes' vectors is of {int(total[0])} clients, but {num_clients} report: a node has sent "
            "another vector, or masks were not removed"
        )
    return Layout.by_name(start).unflatten(torch.from_numpy(fixed_point.decode(total[1:], scale)))
