"""FedSA-LoRA: average A, keep B and the head with each client (Guo et al., arXiv 2410.01463). Personal models.

    A <- sum_i p_i A_i,    client i continues from its own B_i and head

There is no global model to evaluate or to export. Traffic, up and down: r k per module, and no head.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules.fedavg import fedavg

RULE = Rule(
    "fedsa-lora",
    fedavg,
    linear=True,
    shares=frozenset({"A"}),
    averages=False,
    no_copra="each client keeps its own B, so a layer that is off at some clients gets an A that fits no client's B",
    no_several_datasets="a part of each model stays with its client, so there is no global model to test on each data "
    "set",
)
