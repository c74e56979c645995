"""Zero-padding: pad adapters of unequal rank to the largest one and average (baseline in HetLoRA, arXiv 2401.06432).

    A <- sum_i p_i [A_i; 0],    B <- sum_i p_i [B_i 0],    client i trains the first r_i rows and columns

Rows past r_i shrink by client i's weight. Rows past the ranks of all clients of the round stay unchanged: otherwise a
round of clients with small ranks would leave A = B = 0 there for good. Traffic, up and down: r_i (d + k) per module.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from copra_fl.adapters.state import part_of
from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.fedavg import mean


def zero_pad(round_: Round) -> Outcome:
    """Return the average of the padded factors."""
    return Outcome(
        {
            name: padded_mean(round_, name, old, [adapter[name] for adapter in round_.adapters], round_.weights(name))
            for name, old in round_.before.items()
        }
    )


def padded_mean(round_: Round, name: str, old: Tensor, tensors: Sequence[Tensor], weights: np.ndarray) -> Tensor:
    """Return the weighted mean up to the largest rank of the clients with a weight, and `old` past it."""
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


RULE = Rule("zero-pad", zero_pad, unequal_ranks=True)
