"""Coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498): robust against clients that send arbitrary values.

    theta_j <- mean of theta_1j ... theta_Kj without the floor(beta K) largest and smallest

beta is the parameter ``trim-fraction``. Unweighted: a hostile client may claim any number of examples. A client of
weight 0 for a layer has no value there. The head is trimmed too. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.config import option


@dataclass(frozen=True)
class Parameters:
    trim_fraction: float = option(0.2, "share beta of the clients' values to drop at each end", low=0, high=0.49)


def trimmed_mean(round_: Round) -> Outcome:
    """Return the mean of each value over the clients, without the extremes."""
    parameters: Parameters = round_.parameters
    adapter = {}
    for name, old in round_.before.items():
        values = sorted_values(round_, name)
        drop = int(parameters.trim_fraction * len(values) + 1e-9)  # 0.29 * 100 is a little less than 29
        kept = values[drop : len(values) - drop]
        adapter[name] = kept.mean(dim=0).to(old.dtype) if len(kept) else old.clone()
    return Outcome(adapter)


def sorted_values(round_: Round, name: str) -> Tensor:
    """Return (clients, ...) in float64: the values of the clients with a weight, each coordinate in ascending order."""
    has_weight = round_.weights(name) > 0
    values = [adapter[name].double() for adapter, counts in zip(round_.adapters, has_weight, strict=True) if counts]
    return torch.stack(values).sort(dim=0).values if values else torch.empty(0, *round_.before[name].shape)


RULE = Rule("trimmed-mean", trimmed_mean, Parameters)
