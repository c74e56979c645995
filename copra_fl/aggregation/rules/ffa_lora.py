"""FFA-LoRA: freeze A, train and average B (Sun et al., arXiv 2403.12313). Exact.

    A = A_0 for all clients in all rounds,    B <- sum_i p_i B_i,    so that B A_0 = sum_i p_i B_i A_0

A_0 is the common start. Traffic, up and down: r d per module.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import ALL, Rule
from copra_fl.aggregation.rules.fedavg import fedavg


def trained_parts(server_round: int) -> frozenset[str]:
    """Return all parts but A."""
    return ALL - {"A"}


RULE = Rule("ffa-lora", fedavg, linear=True, trains=trained_parts, takes_magnitudes=True)
