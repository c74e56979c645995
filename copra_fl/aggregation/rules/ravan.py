"""RAVAN: several heads of fixed bases, of which clients train the cores (Raje et al., arXiv 2506.05568). Exact.

    W0 + s sum_j s_j B_j H_j A_j,    B_j (d, r / h) and A_j (r / h, k) fixed, H_j (r / h, r / h) and s_j trained
    H_j <- sum_i p_i s_ij H_ij,    s_j <- 1

h, the parameter ``heads``, divides the adapter's rank r. The sum of the heads is W0 + s B R A with a block-diagonal R
(`copra_fl.adapters.core`): h heads reach rank r with r^2 / h trained values, where fed-sb has one block of r^2. Clients
send s_j H_j, as in the paper, so the average is that of the products. B and A are random and orthonormal over all
heads of a module (`copra_fl.models.initial_adapter`), and H_j starts at 0.

We could read the paper's abstract only. Random orthonormal bases and scales that start at 1 in each round are our
choices, and all clients train all heads.
Traffic, up and down: r^2 / h per module.
"""

from __future__ import annotations

from dataclasses import dataclass

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.config import option


@dataclass(frozen=True)
class Parameters:
    heads: int = option(4, "number h of heads; it divides rank, and each head has rank / h", low=2)


def trained_parts(server_round: int) -> frozenset[str]:
    """Return the blocks of R, their scales and the head."""
    return frozenset({"R", "S", "head"})


RULE = Rule("ravan", fedavg, Parameters, trains=trained_parts, core="orthogonal", linear=True)
