"""Coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498): robust against clients that send arbitrary values.

    theta_j <- mean of theta_1j ... theta_Kj without the floor(beta K) largest and smallest

beta is the parameter ``trim-fraction``. Unweighted: a hostile client may claim any number of examples. Only clients
that trained a layer in the round have a value there: with CopRA, a majority whose layer was off would otherwise hold it
still. A layer that few clients trained is decided by those few. The head is trimmed too. Factors of equal products can
differ; `trimmed_mean_product` takes the products instead. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copra_fl.adapters.state import trained
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
        values = client_values(round_, name)
        adapter[name] = trimmed(values, parameters.trim_fraction).to(old.dtype) if len(values) else old.clone()
    return Outcome(adapter)


def client_values(round_: Round, name: str) -> Tensor:
    """Return (clients, ...) in float64: the tensor `name` of each client that trained it."""
    adapters = [trained(update.adapter, update.active_steps, round_.group_of) for update in round_.updates]
    values = [adapter[name].double() for adapter in adapters if name in adapter]
    return torch.stack(values) if values else torch.empty(0, *round_.before[name].shape)


def trimmed(values: Tensor, fraction: float) -> Tensor:
    """Return the mean over the first axis, coordinate by coordinate, without the share `fraction` at each end."""
    drop = num_trimmed(fraction, len(values))
    return values.sort(dim=0).values[drop : len(values) - drop].mean(dim=0)


def num_trimmed(fraction: float, num_values: int) -> int:
    """Return floor(beta K), the number of values that are dropped at each end."""
    return int(fraction * num_values + 1e-9)  # 0.29 * 100 is a little less than 29


RULE = Rule("trimmed-mean", trimmed_mean, Parameters, takes_magnitudes=True)
