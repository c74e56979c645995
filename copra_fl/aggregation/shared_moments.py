"""Moments of the clients' local optimizers, averaged by the server (``optimizer-state = "shared"``).

    m <- sum_k w_k m_k,    v <- sum_k w_k v_k,    t <- t + sum_k w_k a_k

m and v are the moments of AdamW (with SGD, m is the momentum), t the number of steps, w_k the client's weight for the
tensor (`weighting`), and a_k the steps in which the tensor was on at client k. All clients start the next round with
m, v and t. This is the averaging of FedAvg applied to the optimizer as well (Yu et al., arXiv 1905.03817, for momentum;
Local AMSGrad with averaged second moments, Chen et al., arXiv 2009.05127, synchronizes v alone).

Traffic: m and v travel in both directions, so AdamW needs three times the values of `fedavg`, or twice the bytes with
``moments-dtype = "bfloat16"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, OptimizerState, Update
from copra_fl.aggregation.rules.fedavg import mean
from copra_fl.aggregation.weighting import tensor_weights
from copra_fl.config import TrainingConfig


def moment_kinds(training: TrainingConfig) -> tuple[str, ...]:
    """Return torch's names of the moments of the local optimizer."""
    return ("momentum_buffer",) if training.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")


def no_moments(training: TrainingConfig, adapter: Adapter) -> OptimizerState:
    """Return the state of a new optimizer for the tensors of `adapter`: moments and step counts of 0."""
    state = {
        kind: {name: torch.zeros_like(tensor) for name, tensor in adapter.items()} for kind in moment_kinds(training)
    }
    if training.optimizer == "adamw":
        state["step"] = {name: torch.zeros(()) for name in adapter}
    return state


def average_moments(
    before: OptimizerState, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]
) -> OptimizerState:
    """Return the next shared state: the average over the clients, with a tensor that a client did not train unchanged.

    Args:
        before: the state from which the clients started.
        updates: of the round; their `optimizer` has the moments of the tensors that they trained.
    """
    updates = sorted(updates, key=lambda update: update.client)
    state: OptimizerState = {}
    for kind, values in before.items():
        state[kind] = {}
        for name, old in values.items():
            weights = tensor_weights(name, updates, weighting, group_of)
            if kind == "step":
                steps = [_active_steps(update, name, group_of) for update in updates]
                state[kind][name] = old + float(np.dot(weights, steps))
            else:
                state[kind][name] = mean(old, [update.optimizer[kind].get(name, old) for update in updates], weights)
    return state


def _active_steps(update: Update, name: str, group_of: Mapping[str, int]) -> float:
    if name not in update.optimizer["exp_avg"]:
        return 0.0
    return update.active_steps[group_of[name]] if name in group_of else update.metrics["steps"]
