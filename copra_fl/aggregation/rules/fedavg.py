"""FedAvg of LoRA factors (McMahan et al., arXiv 1602.05629; FedIT, arXiv 2305.05644).

    A <- sum_k w_k A_k,    B <- sum_k w_k B_k,    and the head likewise

Factors are averaged apart. That misses the average product by
s sum_k w_k (B_k - B)(A_k - A); linear mode connectivity is what is to make it enough.
It is exact where all clients share A (FFA-LoRA, arXiv 2403.12313), A or B in turn (RoLoRA, arXiv 2409.02346), or
both but for a core R between them (Fed-SB, arXiv 2502.15436).

Traffic, up and down: r (d + k) a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.weighting import tensor_weights


def fedavg(round_: Round) -> Outcome:
    """Factors and head averaged apart; what clients did not train stays as it was."""
    return Outcome(weighted_average(round_.before, round_.updates, round_.settings.weighting, round_.group_of))


def weighted_average(
    global_adapter: Adapter, updates: Sequence[Update], weighting: str, group_of: Mapping[str, int]
) -> Adapter:
    """The weighted average of the clients' tensors, summed in float64 in the order of their numbers.

    A tensor that a client did not send counts as unchanged; one that nobody weighs keeps its old value.
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
    """sum_k weights_k tensors_k, in float64 and then as `old` is; a copy of `old` where all weights are 0."""
    if not weights.any():
        return old.clone()
    total = torch.zeros_like(old, dtype=torch.float64)
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor.double()
    return total.to(old.dtype)
