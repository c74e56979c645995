"""Pooled updates: one update in place of several, for rules that are linear in the updates.

    theta = sum_k w_k theta_k / sum_k w_k,    N = sum_k n_k,    a_l = sum_k n_k a_kl / N

For the Gram mean, which is linear in sum_k w_k theta_k G_k and sum_k w_k G_k, theta is the Gram mean of B, and
G = sum_k w_k G_k / sum_k w_k goes with it (G_k = 0 at a client that did not train the module).

With w_k = n_k, or n_k a_kl if layers are weighted by activity, the weight of the pooled update is N, or
N a_l = sum_k n_k a_kl: the same as the weight of all its clients together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from copra_fl.adapters.state import Adapter, Update, trained
from copra_fl.aggregation.rules import find_rule
from copra_fl.aggregation.rules.ffa_lora_gram import gram_means
from copra_fl.config import Config


def pools(config: Config) -> bool:
    """Return whether nodes may send one pooled update in place of their clients' individual updates."""
    federation, aggregation = config.federation, config.aggregation
    return (
        federation.updates == "pooled"
        and find_rule(aggregation.rule).linear
        and federation.uplink_dtype == "float32"
        and (aggregation.weighting != "equal" or config.privacy.secure_aggregation)
        and not aggregation.control_variates
        and config.training.optimizer_state != "shared"
        and not aggregation.client_ranks
        and federation.start == "common"
        and not federation.stale_clients
        and len(config.data.datasets) < 2
    )


def pool(global_adapter: Adapter, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]) -> Update:
    """Return the update that has the same effect on the result of a linear rule as all of `updates`."""
    pooled = pool_scalars(updates)
    averaged, grams = gram_means(global_adapter, updates, weighting, group_of)
    return replace(pooled, adapter=trained(averaged, pooled.active_steps, group_of), grams=grams)


def pool_scalars(updates: Sequence[Update]) -> Update:
    """Return the pooled update without its tensors; its client is the lowest of the clients' numbers."""
    weights = [update.num_examples for update in updates]
    active_steps = np.average([update.active_steps for update in updates], axis=0, weights=weights)
    loss = np.average([update.metrics["loss"] for update in updates], weights=weights)
    client = min(update.client for update in updates)
    return Update(client, {}, sum(weights), tuple(active_steps.tolist()), {"loss": float(loss)})
