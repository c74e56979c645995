"""Coordinate-wise median (Yin et al., arXiv 1803.01498): robust while fewer than half of the clients are hostile.

    theta_j <- median of theta_1j ... theta_Kj, the mean of the middle two if K is even

Unweighted like the trimmed mean, and applied to the head too. Traffic, up and down: r (d + k) per module.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.trimmed_mean import sorted_values


def median(round_: Round) -> Outcome:
    """Return the median of each value over the clients."""
    adapter = {}
    for name, old in round_.before.items():
        values = sorted_values(round_, name)
        middle = values[(len(values) - 1) // 2 : len(values) // 2 + 1]
        adapter[name] = middle.mean(dim=0).to(old.dtype) if len(middle) else old.clone()
    return Outcome(adapter)


RULE = Rule("median", median)
