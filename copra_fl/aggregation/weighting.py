"""Weights of the clients in an average, tensor by tensor.

    examples   w_k  = n_k / sum_j n_j
    equal      w_k  = 1 / K
    activity   w_kl = n_k a_kl / sum_j n_j a_jl,   a_kl = steps in which layer l was on at client k

With `activity` a client that never trained a layer has weight 0 for it. A layer that no client trained has weight 0 for
all of them and keeps its old value. The head is always trained, so with `activity` it is weighted by examples. A client
without a given part of the head (`heads`) has weight 0 for that part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from copra_fl.adapters.state import Update
from copra_fl.aggregation.heads import is_part


def tensor_weights(name: str, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]) -> np.ndarray:
    """Return (clients,) float64 weights: they sum to 1, or are 0 if no client trained the tensor's layer."""
    weights = np.array([1 if weighting == "equal" else update.num_examples for update in updates], dtype=np.float64)
    if weighting == "activity" and name in group_of:
        weights *= [update.active_steps[group_of[name]] for update in updates]
    if is_part(name):
        weights *= [name in update.adapter for update in updates]
    total = weights.sum()
    return weights / total if total > 0 else weights
