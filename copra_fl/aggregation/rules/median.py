"""Coordinate-wise median (Yin et al., arXiv 1803.01498): survives up to half of the clients.

    theta_j <- median of theta_1j ... theta_Kj, the mean of the middle two where K is even

Unweighted, as the trimmed mean is, and over the head too. Traffic, up and down: r (d + k) a module.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.rules.trimmed_mean import sorted_values


def median(round_: Round) -> Outcome:
    """Each value's median over the clients."""
    adapter = {}
    for name, old in round_.before.items():
        values = sorted_values(round_, name)
        middle = values[(len(values) - 1) // 2 : len(values) // 2 + 1]
        adapter[name] = middle.mean(dim=0).to(old.dtype) if len(middle) else old.clone()
    return Outcome(adapter)
