"""Coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498): survives clients that send anything.

    theta_j <- mean of what is left of theta_1j ... theta_Kj without the floor(beta K) largest and smallest

Unweighted: a hostile client may claim any number of examples. A client that the weighting leaves out of a layer has
no value there. The head is trimmed like all else. Traffic, up and down: r (d + k) a module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copra_fl.aggregation.rule import Outcome, Round


def trimmed_mean(round_: Round) -> Outcome:
    """Each value's mean over the clients without its extremes."""
    adapter = {}
    for name, old in round_.before.items():
        values = sorted_values(round_, name)
        drop = int(round_.settings.trim_fraction * len(values) + 1e-9)  # 0.29 * 100 is a little less than 29
        kept = values[drop : len(values) - drop]
        adapter[name] = kept.mean(dim=0).to(old.dtype) if len(kept) else old.clone()
    return Outcome(adapter)


def sorted_values(round_: Round, name: str) -> Tensor:
    """(clients, ...) in float64: the values of the clients that count, each coordinate in ascending order."""
    counts = round_.weights(name) > 0
    values = [adapter[name].double() for adapter, one in zip(round_.adapters, counts, strict=True) if one]
    return torch.stack(values).sort(dim=0).values if values else torch.empty(0, *round_.before[name].shape)
