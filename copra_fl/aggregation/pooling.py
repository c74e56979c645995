"""One update in place of many, for rules that are linear in the updates.

    theta = sum_k w_k theta_k / sum_k w_k,    N = sum_k n_k,    a_l = sum_k n_k a_kl / N

With w_k = n_k, or n_k a_kl where layers are weighted by activity, the pooled update weighs
N, or N a_l = sum_k n_k a_kl: as much as all of its clients together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from copra_fl.adapters.state import Adapter, Update, trained
from copra_fl.aggregation.rules.fedavg import weighted_average


def pool(global_adapter: Adapter, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]) -> Update:
    """The update that changes a linear rule's result as much as all of `updates` do."""
    pooled = pool_scalars(updates)
    averaged = weighted_average(global_adapter, updates, weighting, group_of)
    return replace(pooled, adapter=trained(averaged, pooled.active_steps, group_of))


def pool_scalars(updates: Sequence[Update]) -> Update:
    """The pooled update of `updates` without its tensors; it goes by the lowest of their numbers."""
    weights = [update.num_examples for update in updates]
    active_steps = np.average([update.active_steps for update in updates], axis=0, weights=weights)
    loss = np.average([update.metrics["loss"] for update in updates], weights=weights)
    client = min(update.client for update in updates)
    return Update(client, {}, sum(weights), tuple(active_steps.tolist()), {"loss": float(loss)})
