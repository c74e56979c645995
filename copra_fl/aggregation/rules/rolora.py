"""RoLoRA: train and average B and A in turn (Chen et al., arXiv 2409.02346 and 2502.01755). Exact.

    odd rounds    A as it is,    B <- sum_i p_i B_i,    so that B A = sum_i p_i B_i A
    even rounds   B as it is,    A <- sum_i p_i A_i,    so that B A = sum_i p_i B A_i

Traffic, up and down: r d per module in odd rounds, r k in even ones.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import ALL, Rule
from copra_fl.aggregation.rules.fedavg import fedavg


def trained_parts(server_round: int) -> frozenset[str]:
    """Return all parts but A in odd rounds, and all but B in even ones."""
    return ALL - {"A" if server_round % 2 else "B"}


RULE = Rule("rolora", fedavg, linear=True, trains=trained_parts, takes_magnitudes=True)
