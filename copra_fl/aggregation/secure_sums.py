"""Updates as the vector that secure aggregation adds up, and the pooled update of the sum.

    vector of a node   ( W_0, W_1, ..., W_L,   sum_k w_k(x) (theta_k(x) - theta_0(x)) for every value x )
    w_k(x)             n_k, and n_k a_kl for values of layer l if layers are weighted by activity
    W_0, W_l           sum_k n_k, and sum_k n_k a_kl; the latter only with that weighting

The sums run over the clients of a node. Weights are whole numbers, so the server finds them exactly, and compares them
with what the clients report: a sum from which a mask was not removed is noticed.

The scale of the fixed-point numbers follows from the configuration and the number of nodes alone: changes are at most
`max-update-norm` in each value, and the weights of a node at most `LARGEST_WEIGHT`, which the node checks. A scale of
the server's choice could round the vectors of all nodes but one to 0, and the sum would be that one node's update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, Layout, Update, trained
from copra_fl.aggregation.pooling import pool_scalars
from copra_fl.secure_aggregation import fixed_point
from copra_fl.secure_aggregation.errors import SecureAggregationError

#: largest weight in the vector of a node: training examples, with ``activity`` times optimizer steps
LARGEST_WEIGHT = 2**30


def sum_scale(max_update_norm: float, num_nodes: int) -> float:
    """Return the scale of the values if each of `num_nodes` nodes has weights up to `LARGEST_WEIGHT`."""
    return fixed_point.scale_for(LARGEST_WEIGHT * max_update_norm, num_nodes)


def vector_of(
    start: Adapter,
    updates: Sequence[Update],
    weighting: str,
    group_of: Mapping[str, int],
    num_groups: int,
    scale: float,
    num_nodes: int,
) -> np.ndarray:
    """Return the vector of a node, (weights + values,) uint64.

    Args:
        start: the tensors that clients may send, before their training.
        updates: of the node's clients; a tensor that a client has not trained counts as unchanged.
        num_groups: number of gate groups.
        scale: of the values (`fixed_point`).
        num_nodes: number of nodes whose vectors are added.

    Raises SecureAggregationError for a weight above `LARGEST_WEIGHT`, and for a value that does not fit.
    """
    weights = total_weights(updates, weighting, num_groups)
    if weights.max() > LARGEST_WEIGHT:
        raise SecureAggregationError(
            f"the weights of a node's clients add up to more than {LARGEST_WEIGHT}; spread the clients over more nodes"
        )
    layout = Layout.by_name(start)
    values = torch.zeros(layout.size, dtype=torch.float64)
    for update in updates:
        for name, tensor in update.adapter.items():
            weight = weights_of(update, weighting, num_groups)[slot_of(name, weighting, group_of)]
            values[layout.spans[name]] += weight * (tensor.double() - start[name].double()).reshape(-1)
    return np.concatenate(
        [fixed_point.encode(weights, 1.0, num_nodes), fixed_point.encode(values.numpy(), scale, num_nodes)]
    )


def pooled_update(
    total: np.ndarray,
    start: Adapter,
    updates: Sequence[Update],
    weighting: str,
    group_of: Mapping[str, int],
    num_groups: int,
    scale: float,
) -> Update:
    """Return the pooled update of all clients from the sum of the nodes' vectors.

    `updates` are those of all clients, without tensors. Each value is off by at most `fixed_point.largest_error`
    divided by its weight, and the rounding to float32. Raises SecureAggregationError if the weights in the sum are not
    those of the clients.
    """
    expected = total_weights(updates, weighting, num_groups)
    weights = fixed_point.decode(total[: len(expected)], 1.0)
    if not np.array_equal(weights, expected):
        raise SecureAggregationError(
            "the sum of the nodes' vectors does not have the weights that the clients report: a node has sent another "
            "vector, or masks were not removed"
        )
    layout, values = Layout.by_name(start), torch.from_numpy(fixed_point.decode(total[len(expected) :], scale))
    adapter = {}
    for name, tensor in start.items():
        weight = expected[slot_of(name, weighting, group_of)]
        change = values[layout.spans[name]].view(tensor.shape) / max(weight, 1)
        adapter[name] = (tensor.double() + change).to(tensor.dtype)
    pooled = pool_scalars(updates)
    return replace(pooled, adapter=trained(adapter, pooled.active_steps, group_of))


def vector_size(start: Adapter, weighting: str, num_groups: int) -> int:
    """Return the number of values in a node's vector."""
    return Layout.by_name(start).size + num_weights(weighting, num_groups)


def num_weights(weighting: str, num_groups: int) -> int:
    """Return the number of weights at the beginning of a vector."""
    return 1 + (num_groups if weighting == "activity" else 0)


def slot_of(name: str, weighting: str, group_of: Mapping[str, int]) -> int:
    """Return the place of the weight of the tensor `name` among the weights."""
    return 1 + group_of[name] if weighting == "activity" and name in group_of else 0


def weights_of(update: Update, weighting: str, num_groups: int) -> list[float]:
    """Return the weights of a client: its examples, and with ``activity`` the same times the steps of each layer."""
    steps = update.active_steps if num_weights(weighting, num_groups) > 1 else ()
    return [update.num_examples, *(update.num_examples * count for count in steps)]


def total_weights(updates: Iterable[Update], weighting: str, num_groups: int) -> np.ndarray:
    """Return (weights,) float64: the sums of the clients' weights; exact, because they are whole numbers."""
    total = np.zeros(num_weights(weighting, num_groups))
    for update in updates:
        total += weights_of(update, weighting, num_groups)
    return total
