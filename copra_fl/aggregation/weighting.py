"""What each client weighs in an average, tensor by tensor.

    examples   w_k  = n_k / sum_j n_j
    equal      w_k  = 1 / K
    activity   w_kl = n_k a_kl / sum_j n_j a_jl,   a_kl = steps in which layer l was on at client k

With `activity` a client that never trained a layer does not count for it, and a layer that
nobody trained has weight 0 everywhere: it keeps its old value. The head is always trained,
so it is weighted by examples either way; a part of it that a client has not (`heads`) does not count for that client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from copra_fl.adapters.state import Update
from copra_fl.aggregation.heads import is_part


def tensor_weights(name: str, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]) -> np.ndarray:
    """float64 of shape (clients,): sums to 1, or is 0 where nobody trained the tensor's layer."""
    weights = np.array([1 if weighting == "equal" else update.num_examples for update in updates], dtype=np.float64)
    if weighting == "activity" and name in group_of:
        weights *= [update.active_steps[group_of[name]] for update in updates]
    if is_part(name):
        weights *= [name in update.adapter for update in updates]
    total = weights.sum()
    return weights / total if total > 0 else weights
