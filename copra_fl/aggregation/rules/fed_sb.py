"""Fed-SB: fix B and A, train and average a matrix R between them (Singhal et al., arXiv 2502.15436). Exact.

    W0 + s B R A,    B (d, r) and A (r, k) fixed,    R <- sum_i p_i R_i (r, r),    so that B R A = sum_i p_i B R_i A

B and A are set before the first round from the gradient of the loss with respect to W0, on the server's validation
data (`copra_fl.models.fed_sb_init`). `copra_fl.models.build` inserts R, the ``core`` of the adapter, into each LoRA
layer. Traffic, up and down: r^2 per module.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules.fedavg import fedavg


def trained_parts(server_round: int) -> frozenset[str]:
    """Return R and the head."""
    return frozenset({"R", "head"})


RULE = Rule(
    "fed-sb",
    fedavg,
    trains=trained_parts,
    core="gradient",
    linear=True,
    needs_data=True,
    no_copra="B and A are fixed by a first gradient with every layer on; they do not fit a model with layers off",
)
