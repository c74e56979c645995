"""Zero-padding: adapters of unequal rank, padded to the largest and averaged (baseline of HetLoRA, arXiv 2401.06432).

    A <- sum_i p_i [A_i; 0],    B <- sum_i p_i [B_i 0],    client i trains the first r_i rows and columns

Rows past r_i shrink by client i's share; rows past every rank of the round stay as they were, or a round of small
clients would leave A = B = 0 there for good. Traffic, up and down: r_i (d + k) a module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import part_of
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.fedavg import mean


def zero_pad(round_: Round) -> Outcome:
    """FedAvg over padded factors."""
    return Outcome(
        {
            name: padded_mean(round_, name, old, [adapter[name] for adapter in round_.adapters], round_.weights(name))
            for name, old in round_.before.items()
        }
    )


def padded_mean(round_: Round, name: str, old: Tensor, tensors: Sequence[Tensor], weights: np.ndarray) -> Tensor:
    """The weighted mean up to the largest rank of the clients that count, and past it `old`."""
    averaged = mean(old, tensors, weights)
    axis = {"A": 0, "B": 1}.get(part_of(name))
    if axis is None or not weights.any():
        return averaged
    full = old.shape[axis]
    used = max(
        round_.ranks.get(update.client, full) if name in update.adapter else full
        for update, weight in zip(round_.updates, weights, strict=True)
        if weight
    )
    return torch.cat([averaged.narrow(axis, 0, used), old.narrow(axis, used, full - used)], dim=axis)
