"""Coordinate-wise median (Yin et al., arXiv 1803.01498): robust while fewer than half of the clients are hostile.

    theta_j <- median of theta_1j ... theta_Kj, the mean of the middle two if K is even

Unweighted, over the clients that trained the layer, and applied to the head too, like the trimmed mean. Factors of
equal products can differ; `median_product` takes the products instead. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from torch import Tensor

from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.trimmed_mean import client_values


def median(round_: Round) -> Outcome:
    """Return the median of each value over the clients."""
    adapter = {}
    for name, old in round_.before.items():
        values = client_values(round_, name)
        adapter[name] = middle(values).to(old.dtype) if len(values) else old.clone()
    return Outcome(adapter)


def middle(values: Tensor) -> Tensor:
    """Return the median over the first axis, coordinate by coordinate: the mean of the middle two of an even number."""
    ordered = values.sort(dim=0).values
    return ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1].mean(dim=0)


RULE = Rule("median", median, takes_magnitudes=True)
