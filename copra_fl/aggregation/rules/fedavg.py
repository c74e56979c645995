"""FedAvg of LoRA factors (McMahan et al., arXiv 1602.05629; FedIT, arXiv 2305.05644).

    A <- sum_k w_k A_k,    B <- sum_k w_k B_k,    and the head likewise

A and B are averaged separately. The product of the averages misses the average product by
s sum_k w_k (B_k - B)(A_k - A), which is small if the clients are linearly mode connected. It is 0 if all clients share
A (`ffa_lora`), A or B in turn (`rolora`), or both (`fed_sb`).

Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.weighting import tensor_weights


def fedavg(round_: Round) -> Outcome:
    """Return the average of each tensor; tensors that no client trained stay unchanged."""
    return Outcome(weighted_average(round_.before, round_.updates, round_.settings.weighting, round_.group_of))


def weighted_average(
    global_adapter: Adapter, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]
) -> Adapter:
    """Return the weighted average of the clients' tensors, summed in float64 in the order of the clients' numbers.

    A tensor that a client did not send counts as unchanged; one without any weight keeps its old value.
    """
    updates = sorted(updates, key=lambda update: update.client)
    return {
        name: mean(
            old,
            [update.adapter.get(name, old) for update in updates],
            tensor_weights(name, updates, weighting, group_of),
        )
        for name, old in global_adapter.items()
    }


def mean(old: Tensor, tensors: Sequence[Tensor], weights: np.ndarray) -> Tensor:
    """Return sum_k weights_k tensors_k, summed in float64, in the dtype of `old`; a copy of `old` if all are 0."""
    if not weights.any():
        return old.clone()
    total = torch.zeros_like(old, dtype=torch.float64)
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor.double()
    return total.to(old.dtype)


RULE = Rule("fedavg", fedavg, linear=True, takes_magnitudes=True)
